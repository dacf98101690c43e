"""The MAGVIT tokenizer: a 3D-VQ autoencoder, and the 2D one that it is inflated from.

Facts: MAGVIT (arXiv 2212.05199), section 3.1 and appendix A, and the released code and configs,
which are followed where they differ from the prose. Clips have s_t * k frames (16 published), and
every token sees the whole clip: convolutions look both ways in time and the group norms' statistics
span it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.models.magvit_v2 import TokenizerOutput
from magvit_fast.nn.conv import SameConv3d
from magvit_fast.nn.norm import MAX_GROUPS, GroupNormSiLU, group_count, upsample_nearest
from magvit_fast.nn.vector_quantize import EntropyKind, VectorQuantizer
from magvit_fast.ops._checks import values_can_be_read
from magvit_fast.ops.causal_conv3d import PAD_MODES, PadMode


@dataclass(frozen=True)
class MagvitConfig:
    """Everything that defines a tokenizer. The defaults are MAGVIT-B: 16x128x128 -> 4x16x16.

    Attributes:
        filters: base width f (64 for B, 128 for L).
        channel_multipliers: width of level i is f * channel_multipliers[i].
        temporal_downsample: whether the pooling after level i halves time too; one entry per level
            but the last. Published: the shallow ones.
        num_res_blocks: residual blocks per level (and once more beside the latent).
        codebook_size, embedding_dim: rows and width of the codebook.
        in_channels: channels of the video.
        pad_mode: of the convolutions: "zeros" (the released configs) or "reflect" (the paper's
            text), or "replicate".
        frame_by_frame: the 2D tokenizer: kernels 1 x k x k, norms per frame, no pooling in time.
        norm_groups: groups of every group norm (each channel its own where there are fewer).
        commitment_weight, codebook_weight, entropy_weight, temperature, entropy_kind: see
            nn.vector_quantize.VectorQuantizer.
    """

    filters: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (True, True, False)
    num_res_blocks: int = 2
    codebook_size: int = 1024
    embedding_dim: int = 256
    in_channels: int = 3
    pad_mode: PadMode = "zeros"
    frame_by_frame: bool = False
    norm_groups: int = MAX_GROUPS
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.1
    temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        for name in ("filters", "in_channels", "num_res_blocks", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive int, got {getattr(self, name)}")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size: expected 2 or more, got {self.codebook_size}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers: expected positive ints, got {self.channel_multipliers}"
            )
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                "temporal_downsample: expected one entry per level but the last "
                f"({len(self.channel_multipliers) - 1}), got {self.temporal_downsample}"
            )
        if self.frame_by_frame and any(self.temporal_downsample):
            raise ValueError(
                "temporal_downsample: expected False everywhere with frame_by_frame, "
                f"got {self.temporal_downsample}"
            )
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode: expected one of {PAD_MODES}, got {self.pad_mode!r}")
        for width in self.widths:
            group_count(width, self.norm_groups)

    @property
    def causal(self) -> bool:
        """Slots of a clip hold equal groups of frames (see tasks.ClipGeometry)."""
        return False

    @property
    def num_bits(self) -> int:
        """Bits of a token, as the masked transformer counts them.

        Raises:
            ValueError: the codebook size is no power of two; such tokens fit no MaskedTransformer.
        """
        if self.codebook_size & (self.codebook_size - 1):
            raise ValueError(
                "codebook_size: expected a power of two for use with a transformer, "
                f"got {self.codebook_size}"
            )
        return self.codebook_size.bit_length() - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.filters * m for m in self.channel_multipliers)

    @property
    def time_stride(self) -> int:
        """Frames per latent slot."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def space_stride(self) -> int:
        """Pixels per latent cell, per axis."""
        return int(2 ** len(self.temporal_downsample))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the tokens of one clip; each rounds up."""
        t, s = self.time_stride, self.space_stride
        return -(-frames // t), -(-height // s), -(-width // s)


# ---- layers --------------------------------------------------------------------------------------
def _conv(
    config: MagvitConfig, in_channels: int, out_channels: int, kernel: int, *, bias: bool
) -> SameConv3d:
    size = (1 if config.frame_by_frame else kernel, kernel, kernel)
    return SameConv3d(
        in_channels, out_channels, size, bias=bias, pad_mode=config.pad_mode, init="lecun"
    )


def _norm(config: MagvitConfig, channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(channels, groups=config.norm_groups, per_frame=config.frame_by_frame)


class ResBlock(nn.Module):
    """Norm, SiLU, conv 3x3x3, twice, plus a 1x1x1 shortcut where the width changes; no biases."""

    def __init__(self, config: MagvitConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = _conv(config, in_channels, out_channels, 3, bias=False)
        self.norm2 = _norm(config, out_channels)
        self.conv2 = _conv(config, out_channels, out_channels, 3, bias=False)
        self.shortcut = (
            _conv(config, in_channels, out_channels, 1, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, T, H, W] -> [B, C_out, T, H, W]."""
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        skip = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = skip + y
        return out


def _blocks(config: MagvitConfig, in_channels: int, out_channels: int) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * config.num_res_blocks
    return nn.Sequential(
        *(ResBlock(config, widths[i], widths[i + 1]) for i in range(config.num_res_blocks))
    )


class AveragePool(nn.Module):
    """Mean over windows of (s_t, 2, 2); odd sizes round up and count what is there alone."""

    def __init__(self, *, temporal: bool) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool3d(x, self.factor, ceil_mode=True, count_include_pad=False)


class Upsample(nn.Module):
    """Every value repeated (s_t, 2, 2) times, then a convolution with bias."""

    def __init__(self, config: MagvitConfig, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)
        self.conv = _conv(config, channels, channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(upsample_nearest(x, self.factor, x.shape[2] * self.factor[0]))
        return out


class Level(nn.Module):
    """Residual blocks of one width, then a change of resolution unless `resample` is None."""

    def __init__(self, blocks: nn.Sequential, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.resample is None else self.resample(x)


def _run(level: nn.Module, recompute: bool, x: Tensor) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(level, x, use_reentrant=False)  # type: ignore[no-any-return]
    return level(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """[B, C, T, H, W] -> latent [B, D, T', H', W']. Odd sizes round up per level."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths, down = config.widths, config.temporal_downsample
        self.conv_in = _conv(config, config.in_channels, config.filters, 3, bias=False)
        entries = (config.filters, *widths[:-1])
        self.levels = nn.ModuleList(
            Level(
                _blocks(config, entries[i], width),
                AveragePool(temporal=down[i]) if i < len(down) else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_blocks = _blocks(config, widths[-1], widths[-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = _conv(config, widths[-1], config.embedding_dim, 1, bias=True)
        self.checkpointed: frozenset[int] = frozenset()

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv_in(video)
        for i, level in enumerate(self.levels):
            x = _run(level, i in self.checkpointed, x)
        out: Tensor = self.conv_out(self.norm_out(self.mid_blocks(x)))
        return out


class Decoder(nn.Module):
    """Latent [B, D, T', H', W'] -> video [B, C, T, H, W], linear output."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths, down = config.widths, config.temporal_downsample
        self.conv_in = _conv(config, config.embedding_dim, widths[-1], 3, bias=True)
        self.mid_blocks = _blocks(config, widths[-1], widths[-1])
        entries = (*widths[1:], widths[-1])
        # In the order of execution: the deepest level first.
        self.levels = nn.ModuleList(
            Level(
                _blocks(config, entries[i], widths[i]),
                Upsample(config, widths[i], temporal=down[i - 1]) if i > 0 else None,
            )
            for i in reversed(range(len(widths)))
        )
        self.norm_out = _norm(config, widths[0])
        self.conv_out = _conv(config, widths[0], config.in_channels, 3, bias=True)
        self.checkpointed: frozenset[int] = frozenset()

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid_blocks(self.conv_in(latent))
        for i, level in enumerate(self.levels):
            x = _run(level, len(self.levels) - 1 - i in self.checkpointed, x)
        out: Tensor = self.conv_out(self.norm_out(x))
        return out


# ---- the model -----------------------------------------------------------------------------------
class MagvitTokenizer(PretrainedMixin):
    """Video <-> tokens. Videos are [B, C, T, H, W] in [0, 1]; ids int64 [B, T', H', W'].

    Videos of any floating dtype are taken; what comes out has the dtype of the weights.

    Example:
        >>> tokenizer = MagvitTokenizer.from_preset("magvit-b").eval()
        >>> ids = tokenizer.encode(torch.rand(1, 3, 16, 128, 128))   # [1, 4, 16, 16]
        >>> video = tokenizer.decode(ids)                            # [1, 3, 16, 128, 128]
    """

    config_class = MagvitConfig
    config: MagvitConfig

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            config.embedding_dim,
            commitment_weight=config.commitment_weight,
            codebook_weight=config.codebook_weight,
            entropy_weight=config.entropy_weight,
            temperature=config.temperature,
            entropy_kind=config.entropy_kind,
        )

    def forward(self, video: Tensor) -> TokenizerOutput:
        """One training pass.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        z = self.encoder(self._check_video(video))
        quantized = self.quantizer(z)
        reconstruction = self.decoder(quantized.quantized)
        return TokenizerOutput(reconstruction, quantized.ids, z, quantized.losses)

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, C, s_t k, H, W] in [0, 1] -> ids int64 [B, k, H', W'].

        All frames form one clip: a longer clip is not the same as shorter ones side by side.

        Raises:
            TypeError: the video is no floating-point Tensor.
            ValueError: wrong number of axes or channels; T, H or W no multiple of its stride; NaN
                or infinite pixels.
        """
        video = self._check_video(video)
        # Tokens of a damaged frame would look like any others.
        if values_can_be_read(video) and not torch.isfinite(video).all():
            raise ValueError("video: expected finite values, got NaN or infinity")
        ids: Tensor = self.quantizer(self.encoder(video), with_losses=False).ids
        return ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T', H', W'] -> video [B, C, s_t T', s_h H', s_w W'], clamped to [0, 1].

        Raises:
            TypeError: ids are not int64.
            ValueError: ids are not 4-D or outside 0 .. codebook_size - 1.
        """
        codes = self.quantizer.codes(ids)
        if ids.dim() != 4 or min(ids.shape[1:]) < 1:
            raise ValueError(f"ids: expected [B, T', H', W'], got {tuple(ids.shape)}")
        video: Tensor = self.decoder(codes.contiguous(memory_format=torch.channels_last_3d))
        return video.clamp(0, 1)

    # ---- piece by piece -------------------------------------------------------------------------
    def encode_stream(self, frames: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode pieces of a video [B, C, n, H, W]; yields ids of each, int64 [B, n, H', W'].

        For the frame-by-frame tokenizer alone: their concatenation along axis 1 is then `encode` of
        the whole.

        Raises:
            NotImplementedError: a 3D tokenizer; each of its tokens depends on every frame, so that
                no piece can be encoded before the last frame is there.
        """
        self._check_streams("encode")
        pieces = [frames] if isinstance(frames, Tensor) else frames
        return (self._encode_piece(piece) for piece in pieces)

    def decode_stream(self, ids: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode pieces of tokens int64 [B, n, H', W']; yields videos [B, C, n, H, W].

        Raises:
            NotImplementedError: as `encode_stream`.
        """
        self._check_streams("decode")
        pieces = [ids] if isinstance(ids, Tensor) else ids
        return (self._decode_piece(piece) for piece in pieces)

    @torch.no_grad()
    def _encode_piece(self, frames: Tensor) -> Tensor:
        return self.encode(frames)

    @torch.no_grad()
    def _decode_piece(self, ids: Tensor) -> Tensor:
        return self.decode(ids)

    def _check_streams(self, verb: str) -> None:
        if not self.config.frame_by_frame:
            raise NotImplementedError(
                f"{verb}_stream: MAGVIT's 3D tokenizer is not causal (every token depends on all "
                f"frames of its clip); cut the video into clips and {verb} each of them, or use "
                "MagvitV2Tokenizer, which streams"
            )

    def set_gradient_checkpointing(self, levels: Sequence[int] | bool = True) -> None:
        """Recompute the activations of these levels in the backward pass instead of keeping them.

        `levels` counts from the pixels (0) to the latent, encoder and decoder alike; True means
        all, False none. The first levels hold most of the memory.
        """
        count = len(self.config.channel_multipliers)
        chosen = range(count if levels else 0) if isinstance(levels, bool) else levels
        if any(not 0 <= i < count for i in chosen):
            raise ValueError(f"levels: expected indices in 0..{count - 1}, got {list(chosen)}")
        self.encoder.checkpointed = self.decoder.checkpointed = frozenset(chosen)

    def _check_video(self, video: Tensor) -> Tensor:
        if not isinstance(video, Tensor) or not video.is_floating_point():
            raise TypeError(
                "video: expected a floating-point Tensor, "
                f"got {getattr(video, 'dtype', type(video))}"
            )
        c = self.config.in_channels
        if video.dim() != 5 or video.shape[1] != c:
            raise ValueError(f"video: expected [B, {c}, T, H, W], got {tuple(video.shape)}")
        t, h, w = video.shape[2:]
        step, s = self.config.time_stride, self.config.space_stride
        if t < 1 or t % step:
            raise ValueError(f"video: expected a multiple of {step} frames, got {t}")
        if h < 1 or w < 1 or h % s or w % s:
            raise ValueError(f"video: expected height and width in multiples of {s}, got {h} x {w}")
        dtype = self.encoder.conv_in.weight.dtype
        return video.to(dtype).contiguous(memory_format=torch.channels_last_3d)
