"""The tokenizer of MaskViT: a 2D VQ-GAN that takes every frame by itself.

Source: MaskViT (arXiv 2206.11894), section 3.1, for what it is: a VQ-GAN trained on the data set's
frames with an adversarial and a perceptual loss, whose grid is always 16 x 16 (stride 4 at 64
pixels, 16 at 256). Its widths and codebook are not published; those here are the usual ones of a
VQ-GAN (arXiv 2012.09841: 128 filters, two residual blocks a level, attention at 16 x 16, 1024 codes
of 256 numbers).

Its discriminator here is the 2D StyleGAN one of MAGVIT (Discriminator3D with frame_by_frame), which
of the two kinds in use, that and patches, is the one that the rest of this package trains against;
MaskViT's own is not published.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor, nn

from magvit_fast.models.autoencoder import AutoencoderConfig, Decoder, Encoder, QuantizerKind
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.nn.blocks import FrameAttention, ResBlock3d
from magvit_fast.nn.conv import SamePadMode
from magvit_fast.nn.resample import NearestUpsample, strided_conv
from magvit_fast.nn.stream import StreamState


@dataclass(frozen=True)
class FrameTokenizerConfig(AutoencoderConfig):
    """Everything that defines a tokenizer. The defaults are "maskvit-frame-64": 64x64 -> 16x16.

    Attributes, but for those that all tokenizers have (AutoencoderConfig):
        channel_multipliers: as many as give a 16 x 16 grid: 3 for frames of 64 pixels, 4 for 128,
            5 for 256.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        codebook_size: size of the vocabulary, a power of two.
        attention: attention blocks behind the residual blocks of the deepest level and beside the
            latent.
        entropy_weight: 0, a VQ-GAN has no such loss; MAGVIT's 0.1 keeps small codebooks in use.
        temporal_downsample, frame_by_frame: always nothing and True.
    """

    filters: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    temporal_downsample: tuple[bool, ...] = ()
    num_res_blocks: int = 2
    codebook_size: int = 1024
    _: KW_ONLY
    pad_mode: SamePadMode = "zeros"
    frame_by_frame: bool = True
    quantizer: QuantizerKind = "vq"
    entropy_weight: float = 0.0
    attention: bool = True

    def __post_init__(self) -> None:
        if not self.frame_by_frame:
            raise ValueError("frame_by_frame: expected True for a tokenizer of single frames")
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size: expected a power of two, got {self.codebook_size}")
        if not self.temporal_downsample:
            levels = len(tuple(self.channel_multipliers))
            object.__setattr__(self, "temporal_downsample", (False,) * max(levels - 1, 0))
        super().__post_init__()

    @property
    def num_bits(self) -> int:
        """Bits of a token, as a transformer counts them."""
        return self.codebook_size.bit_length() - 1


class FrameEncoderLevel(nn.Module):
    """Residual blocks of one width, then a strided 3x3 convolution, or attention in the deepest."""

    def __init__(self, config: FrameTokenizerConfig, index: int) -> None:
        super().__init__()
        width, last = config.widths[index], index == len(config.widths) - 1
        entry = config.widths[index - 1] if index else config.filters
        self.blocks = _blocks(config, entry, width, config.num_res_blocks, attend=last)
        self.down = (
            None if last else strided_conv(width, temporal=False, kernel=3, style=config.style)
        )

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, state)
        return x if self.down is None else self.down(x, state)


class FrameDecoderLevel(nn.Module):
    """Residual blocks of one width, with attention in the deepest level, then (but for level 0)
    nearest-neighbor repetition and a 3x3 convolution."""

    def __init__(self, config: FrameTokenizerConfig, index: int) -> None:
        super().__init__()
        width, deepest = config.widths[index], index == len(config.widths) - 1
        entry = width if deepest else config.widths[index + 1]
        self.blocks = _blocks(config, entry, width, config.num_res_blocks + 1, attend=deepest)
        self.up = NearestUpsample(width, temporal=False, style=config.style) if index else None

    def forward(self, x: Tensor, latent: Tensor, state: StreamState | None = None) -> Tensor:
        """The latent plays no part here; other systems' levels are normalized by it."""
        for block in self.blocks:
            x = block(x, state)
        return x if self.up is None else self.up(x, state)


def _blocks(
    config: FrameTokenizerConfig, entry: int, width: int, count: int, *, attend: bool
) -> nn.ModuleList:
    blocks = nn.ModuleList()
    for i in range(count):
        blocks.append(_res_block(config, entry if i == 0 else width, width))
        if attend and config.attention:
            blocks.append(FrameAttention(width, norm_groups=config.norm_groups))
    return blocks


def _res_block(config: FrameTokenizerConfig, in_channels: int, out_channels: int) -> ResBlock3d:
    return ResBlock3d(in_channels, out_channels, bias=True, style=config.style)


def _middle(config: FrameTokenizerConfig) -> nn.ModuleList:
    """Residual block, attention, residual block, beside the latent."""
    width = config.widths[-1]
    blocks = _blocks(config, width, width, 1, attend=True)
    blocks.append(_res_block(config, width, width))
    return blocks


class FrameEncoder(Encoder):
    """Frames [B, C, T, H, W] -> latent [B, D, T, H', W'] before it is quantized.

    VQ-GAN's extra 1x1 convolutions beside the codebook are part of their neighbors here: nothing
    stands between the two that one convolution could not do.
    """

    def _build(self, config: AutoencoderConfig) -> None:
        assert isinstance(config, FrameTokenizerConfig)
        widths, style = config.widths, config.style
        self.conv_in = style.conv(config.in_channels, config.filters)
        self.levels = nn.ModuleList(FrameEncoderLevel(config, i) for i in range(len(widths)))
        self.mid_blocks = _middle(config)
        self.norm_out = style.norm(widths[-1])
        self.conv_out = style.conv(widths[-1], config.latent_channels)


class FrameDecoder(Decoder):
    """Quantized latent [B, D, T, H', W'] -> frames [B, C, T, H, W], linear output."""

    def _build(self, config: AutoencoderConfig) -> None:
        assert isinstance(config, FrameTokenizerConfig)
        widths, style = config.widths, config.style
        self.conv_in = style.conv(config.latent_channels, widths[-1])
        self.mid_blocks = _middle(config)
        # In the order of execution: the deepest level first.
        self.levels = nn.ModuleList(
            FrameDecoderLevel(config, i) for i in reversed(range(len(widths)))
        )
        self.norm_out = style.norm(widths[0])
        self.conv_out = style.conv(widths[0], config.in_channels)


class FrameTokenizer(VideoTokenizer):
    """MaskViT's tokenizer: a video's frames one by one, any number of them; see VideoTokenizer.

    Slot t of the ids is frame t and depends on nothing else, so that a stream is the whole. As in
    the 2D tokenizer of MAGVIT, config.causal is False: slots are equal groups of (one) frame.

    Example:
        >>> tokenizer = FrameTokenizer.from_preset("maskvit-frame-64").eval()
        >>> ids = tokenizer.encode(torch.rand(1, 3, 16, 64, 64))   # [1, 16, 16, 16]
        >>> video = tokenizer.decode(ids)                          # [1, 3, 16, 64, 64]
    """

    config_class = FrameTokenizerConfig
    config: FrameTokenizerConfig
    encoder_class: ClassVar[type[Encoder]] = FrameEncoder
    decoder_class: ClassVar[type[Decoder]] = FrameDecoder
