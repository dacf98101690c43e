"""The MAGVIT-v2 tokenizer: a causal 3D autoencoder around a lookup-free quantizer.

Facts: MAGVIT-v2 (arXiv 2310.05737), section 3 and the appendix architecture figure; where the paper
is silent, Google's port of the original code. Fields express what Open-MAGVIT2 does differently
(compat.open_magvit2). A clip has 1 + 4k frames for the published time stride of 4: slot 0 of the
latent is the first frame alone, slot s depends on frames 0 .. 4s only, and an image is a clip of one
frame.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from magvit_fast.models.autoencoder import AutoencoderConfig, Resample
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.nn.norm import NORM_CONDITIONS, NormCondition
from magvit_fast.ops._checks import check_choice


@dataclass(frozen=True)
class MagvitV2Config(AutoencoderConfig):
    """Everything that defines a tokenizer. The defaults are the published model.

    Attributes, but for those that all tokenizers have (AutoencoderConfig):
        num_bits: bits of a token = channels of the latent (quantizer "vq": the codebook has
            2**num_bits rows).
        norm_groups: below 64 filters the published 32 leave one channel a group, which takes the
            frame's mean color out of every layer; a few wide groups then learn much faster.
        conv_shortcut: 3x3x3 instead of 1x1x1 shortcuts where a block changes the width.
        causal: False is the ablation of table 5a: every layer looks both ways in time, norms span
            the clip, and clips have s_t * k frames.
        resample: "conv" goes down by strided convolutions and up by a convolution and depth to
            space; "pool" by MAGVIT's average pooling and nearest-neighbor repetition with a
            convolution.
        down_kernel: taps of the strided convolutions along each axis: 4 by the published parameter
            counts, 3 by the label in the figure (370.5M in place of 376.0M parameters).
        adaptive_norm: the decoder's levels open with a norm whose scale and shift the latent gives.
        norm_condition: "latent": that norm's scale and shift follow the latent at each position;
            "statistics": they follow its deviation and mean over what the norms span.
        clip_norms: norms span the clip although the convolutions are causal: no streams then.
        keep_first_frame: causal up-sampling keeps the first of the frames that slot 0 gives and
            drops those behind it; otherwise it keeps the last.
        signed_pixels: encoder and decoder work on pixels in [-1, 1]. Videos that are taken and made
            are in [0, 1] all the same.
        num_token_groups, entropy_groups, entropy_balance, entropy_eps: see nn.quantize.LFQ.
    """

    num_bits: int = 18
    _: KW_ONLY
    conv_shortcut: bool = False
    causal: bool = True
    resample: Resample = "conv"
    down_kernel: int = 4
    adaptive_norm: bool = True
    norm_condition: NormCondition = "latent"
    clip_norms: bool = False
    keep_first_frame: bool = False
    signed_pixels: bool = False
    num_token_groups: int = 1
    entropy_groups: int = 1
    entropy_balance: float = 1.0
    entropy_eps: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("resample", self.resample, ("conv", "pool"))
        if self.down_kernel not in (3, 4):
            raise ValueError(f"down_kernel: expected 3 or 4, got {self.down_kernel}")
        check_choice("norm_condition", self.norm_condition, NORM_CONDITIONS)
        if self.clip_norms and self.frame_by_frame:
            raise ValueError("clip_norms: expected False with frame_by_frame, got True")

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return 1 << self.num_bits

    def _lfq_options(self) -> dict[str, Any]:
        return {
            "num_token_groups": self.num_token_groups,
            "entropy_groups": self.entropy_groups,
            "entropy_balance": self.entropy_balance,
            "entropy_eps": self.entropy_eps,
        }


class MagvitV2Tokenizer(VideoTokenizer):
    """MAGVIT-v2's tokenizer; see VideoTokenizer for its methods.

    Example:
        >>> tokenizer = MagvitV2Tokenizer.from_preset("magvit-v2-demo").eval()
        >>> ids = tokenizer.encode(torch.rand(1, 3, 17, 64, 64))   # [1, 5, 8, 8]
        >>> video = tokenizer.decode(ids)                          # [1, 3, 17, 64, 64]
    """

    config_class = MagvitV2Config
    config: MagvitV2Config
