"""The MAGVIT tokenizer: a 3D-VQ autoencoder, and the 2D one that it is inflated from.

Facts: MAGVIT (arXiv 2212.05199), section 3.1 and appendix A, and the released code and configs,
which are followed where they differ from the prose. Clips have s_t * k frames (16 published), and
every token sees the whole clip: convolutions look both ways in time and the group norms' statistics
span it. Resolution changes by average pooling, and by nearest-neighbor repetition before a
convolution.
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Any

from magvit_fast.models.autoencoder import AutoencoderConfig, QuantizerKind
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.nn.conv import SamePadMode
from magvit_fast.nn.style import LayerStyle


@dataclass(frozen=True)
class MagvitConfig(AutoencoderConfig):
    """Everything that defines a tokenizer. The defaults are MAGVIT-B: 16x128x128 -> 4x16x16.

    Attributes, but for those that all tokenizers have (AutoencoderConfig):
        filters: 64 for B, 128 for L.
        temporal_downsample: published: the shallow levels.
        pad_mode: "zeros" (the released configs), "reflect" (the paper's text), "replicate" or "circular".
        codebook_size: size of the vocabulary; with quantizer "lfq" a power of two (2**18 in table
            5a of MAGVIT-v2: 38.6M parameters).
    """

    filters: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (True, True, False)
    num_res_blocks: int = 2
    codebook_size: int = 1024
    _: KW_ONLY
    pad_mode: SamePadMode = "zeros"
    quantizer: QuantizerKind = "vq"

    def __post_init__(self) -> None:
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size: expected 2 or more, got {self.codebook_size}")
        super().__post_init__()
        if self.quantizer == "lfq":
            _ = self.num_bits  # raises

    @property
    def num_bits(self) -> int:
        """Bits of a token, as the masked transformer counts them.

        Raises:
            ValueError: the codebook size is no power of two; such tokens fit no MaskedTransformer.
        """
        if self.codebook_size & (self.codebook_size - 1):
            raise ValueError(
                "codebook_size: expected a power of two for use with a transformer or LFQ, "
                f"got {self.codebook_size}"
            )
        return self.codebook_size.bit_length() - 1

    @property
    def style(self) -> LayerStyle:
        return dataclasses.replace(super().style, init="lecun")

    def _lfq_options(self) -> dict[str, Any]:
        # The release's guard of the logarithm, without which "argmax" is undefined.
        return {"entropy_eps": 1e-5 if self.entropy_kind == "argmax" else 0.0}


class MagvitTokenizer(VideoTokenizer):
    """MAGVIT's tokenizer; see VideoTokenizer for its methods.

    A longer clip is not the same as shorter ones side by side, so that streams need the
    frame-by-frame (2D) tokenizer.

    Example:
        >>> tokenizer = MagvitTokenizer.from_preset("magvit-b").eval()
        >>> ids = tokenizer.encode(torch.rand(1, 3, 16, 128, 128))   # [1, 4, 16, 16]
        >>> video = tokenizer.decode(ids)                            # [1, 3, 16, 128, 128]
    """

    config_class = MagvitConfig
    config: MagvitConfig
