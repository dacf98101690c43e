"""The convolutional autoencoder of the MAGVIT and MAGVIT-v2 tokenizers, and what defines one.

Both systems are one layout with different parts: levels of residual blocks, a change of resolution
between two levels, blocks beside the latent. `AutoencoderConfig` names the parts, so that a step
from one system to the other (tables 5a to 5c of MAGVIT-v2) changes one field; models/magvit.py and
models/magvit_v2.py fix what the papers fix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from magvit_fast.nn.blocks import ResBlock3d, run_blocks
from magvit_fast.nn.conv import SAME_PAD_MODES, SamePadMode
from magvit_fast.nn.norm import MAX_GROUPS, FollowingNorm, NormCondition, group_count
from magvit_fast.nn.quantize import LFQ, EntropyKind
from magvit_fast.nn.recompute import checkpointed, norm_then
from magvit_fast.nn.resample import AveragePool, NearestUpsample, Upsample, strided_conv
from magvit_fast.nn.stream import StreamState, in_chunks
from magvit_fast.nn.style import LayerStyle
from magvit_fast.nn.vector_quantize import VectorQuantizer
from magvit_fast.ops._checks import check_choice, runs_cpu_kernels
from magvit_fast.ops.causal_conv3d import PAD_MODES

QuantizerKind = Literal["lfq", "vq"]
Resample = Literal["conv", "pool"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Fields that every tokenizer of this layout has; MagvitConfig and MagvitV2Config add to them.

    Attributes:
        filters: base width f.
        channel_multipliers: width of level i is f * channel_multipliers[i].
        temporal_downsample: whether the down-sampling after level i halves time too; one entry per
            level but the last.
        num_res_blocks: residual blocks per level (and once more beside the latent).
        in_channels: channels of the video.
        pad_mode: of all convolutions: "zeros", "replicate", "reflect" or, where they look both ways
            in time, "circular".
        frame_by_frame: the 2D tokenizer of images: kernels 1 x k x k, norms per frame, no
            down-sampling in time. models.inflation starts a 3D tokenizer from it.
        norm_groups: groups of every group norm (each channel its own where there are fewer).
        quantizer: "lfq" (the signs of num_bits channels) or "vq" (the nearest of the rows of a
            learned codebook).
        embedding_dim: width of a "vq" codebook.
        commitment_weight, codebook_weight ("vq" alone), entropy_weight, temperature, entropy_kind:
            see nn.quantize.LFQ and nn.vector_quantize.VectorQuantizer.
    """

    filters: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_res_blocks: int = 4
    _: KW_ONLY
    in_channels: int = 3
    pad_mode: SamePadMode = "replicate"
    frame_by_frame: bool = False
    norm_groups: int = MAX_GROUPS
    quantizer: QuantizerKind = "lfq"
    embedding_dim: int = 256
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
        check_choice("pad_mode", self.pad_mode, PAD_MODES if self.causal else SAME_PAD_MODES)
        check_choice("quantizer", self.quantizer, ("lfq", "vq"))
        for width in self.widths:
            group_count(width, self.norm_groups)

    # ---- what MAGVIT has not, and MAGVIT-v2 makes fields of ----------------------------------------
    @property
    def causal(self) -> bool:
        """Whether slot 0 is the first frame alone and no token sees later frames."""
        return False

    @property
    def resample(self) -> Resample:
        """How resolution changes, see MagvitV2Config."""
        return "pool"

    @property
    def down_kernel(self) -> int:
        """Taps of the strided convolutions."""
        return 4

    @property
    def adaptive_norm(self) -> bool:
        """Whether the decoder's levels open with a norm that the latent scales and shifts."""
        return False

    @property
    def norm_condition(self) -> NormCondition:
        """What of the latent scales and shifts, see nn.norm.AdaptiveGroupNorm."""
        return "latent"

    @property
    def clip_norms(self) -> bool:
        """Whether norms span the clip although convolutions are causal."""
        return False

    @property
    def keep_first_frame(self) -> bool:
        """Which frame causal up-sampling drops, see nn.resample.Upsample."""
        return False

    @property
    def signed_pixels(self) -> bool:
        """Whether encoder and decoder work on pixels in [-1, 1]."""
        return False

    @property
    def conv_shortcut(self) -> bool:
        """3x3x3 in place of 1x1x1 shortcuts."""
        return False

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        raise NotImplementedError

    @property
    def num_bits(self) -> int:
        """Bits of a token."""
        raise NotImplementedError

    # ---- what follows ---------------------------------------------------------------------------
    @property
    def streams(self) -> bool:
        """Whether a frame can be computed before the ones after it are there."""
        return self.frame_by_frame or (self.causal and not self.clip_norms)

    @property
    def style(self) -> LayerStyle:
        """The kind of convolutions and norms."""
        return LayerStyle(
            self.causal,
            self.frame_by_frame,
            self.pad_mode,
            self.norm_groups,
            clip_norms=self.clip_norms,
        )

    @property
    def latent_channels(self) -> int:
        """Channels of what is quantized."""
        return self.num_bits if self.quantizer == "lfq" else self.embedding_dim

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.filters * m for m in self.channel_multipliers)

    @property
    def time_stride(self) -> int:
        """Frames per latent slot (causal: after the first)."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def space_stride(self) -> int:
        """Pixels per latent cell, per axis."""
        return int(2 ** len(self.temporal_downsample))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the tokens of one clip; all round up."""
        t, s = self.time_stride, self.space_stride
        slots = (frames - 1) // t + 1 if self.causal else -(-frames // t)
        return slots, -(-height // s), -(-width // s)

    def new_quantizer(self) -> LFQ | VectorQuantizer:
        """The quantizer, freshly initialized."""
        if self.quantizer == "lfq":
            return LFQ(
                self.num_bits,
                commitment_weight=self.commitment_weight,
                entropy_weight=self.entropy_weight,
                temperature=self.temperature,
                entropy_kind=self.entropy_kind,
                **self._lfq_options(),
            )
        return VectorQuantizer(
            self.codebook_size,
            self.embedding_dim,
            commitment_weight=self.commitment_weight,
            codebook_weight=self.codebook_weight,
            entropy_weight=self.entropy_weight,
            temperature=self.temperature,
            entropy_kind=self.entropy_kind,
        )

    def _lfq_options(self) -> dict[str, Any]:
        """Further arguments of LFQ."""
        return {}


# ---- levels --------------------------------------------------------------------------------------
def _blocks(config: AutoencoderConfig, in_channels: int, out_channels: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * config.num_res_blocks
    return nn.ModuleList(
        ResBlock3d(widths[i], widths[i + 1], conv_shortcut=config.conv_shortcut, style=config.style)
        for i in range(config.num_res_blocks)
    )


def _down(config: AutoencoderConfig, index: int) -> nn.Module | None:
    """What follows level `index` of the encoder."""
    if index == len(config.temporal_downsample):
        return None
    temporal, style = config.temporal_downsample[index], config.style
    if config.resample == "pool":
        return AveragePool(temporal=temporal, style=style)
    width = config.widths[index]
    return strided_conv(width, temporal=temporal, kernel=config.down_kernel, style=style)


def _up(config: AutoencoderConfig, index: int) -> nn.Module | None:
    """What follows level `index` of the decoder."""
    if index == 0:
        return None
    width, temporal = config.widths[index], config.temporal_downsample[index - 1]
    if config.resample == "pool":  # both copies of a frame are the same: any may be dropped
        return NearestUpsample(width, temporal=temporal, style=config.style)
    first = config.keep_first_frame
    return Upsample(width, temporal=temporal, keep_first_frame=first, style=config.style)


class EncoderLevel(nn.Module):
    """Residual blocks of one width, then (but for the last level) down-sampling."""

    def __init__(self, config: AutoencoderConfig, index: int) -> None:
        super().__init__()
        entry = config.widths[index - 1] if index else config.filters
        self.blocks = _blocks(config, entry, config.widths[index])
        self.down = _down(config, index)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        x = run_blocks(self.blocks, x, state)
        return x if self.down is None else self.down(x, state)


class DecoderLevel(nn.Module):
    """Adaptive norm, residual blocks of one width, then (but for level 0) up-sampling."""

    def __init__(self, config: AutoencoderConfig, index: int) -> None:
        super().__init__()
        widths = config.widths
        entry = widths[min(index + 1, len(widths) - 1)]
        self.cond_norm = (
            config.style.adaptive_norm(entry, config.latent_channels, config.norm_condition)
            if config.adaptive_norm
            else None
        )
        self.blocks = _blocks(config, entry, widths[index])
        self.up = _up(config, index)
        # How much finer than the latent this level's grid is.
        above = config.temporal_downsample[index:]
        self.factor = (2 ** sum(above), 2 ** len(above), 2 ** len(above))

    def forward(self, x: Tensor, latent: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.before_up(x, latent, state)
        return x if self.up is None else self.up(x, state)

    def before_up(self, x: Tensor, latent: Tensor, state: StreamState | None) -> Tensor:
        if self.cond_norm is not None:
            x = self.cond_norm(x, latent, self.factor)
        return run_blocks(self.blocks, x, state)


# ---- the two halves ------------------------------------------------------------------------------
# Inference on the CPU takes the finest level of a large clip through time in pieces: its tensors are
# the largest by far, and causal layers need few frames of the piece before. Four frames share the
# products of a convolution (Winograd's algorithm over time), in pieces as in the whole.
PIECE_FRAMES = 4
PIECES_FROM = 1 << 25  # elements of a tensor of the finest level


def _in_pieces(config: AutoencoderConfig, clip: Sequence[int], like: Tensor) -> bool:
    """Whether the finest level of a clip [B, C, T, H, W] is taken through time in pieces."""
    elements = config.widths[0] * math.prod(clip) // clip[1]
    return (
        elements > PIECES_FROM
        and config.causal
        and config.streams
        and len(config.widths) > 1
        and runs_cpu_kernels(like)  # plain torch would copy what a layer remembers at each piece
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _cut(frames: int, first: int, step: int) -> list[int]:
    """Lengths of the pieces: `first` frames, then `step` at a time."""
    rest = max(frames - first, 0)
    return [min(first, frames)] + [step] * (rest // step) + [rest % step] * (rest % step > 0)


class Encoder(nn.Module):
    """[B, C, T, H, W] -> latent [B, D, T', H', W'] before it is quantized.

    Odd sizes round up per level.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self._config = config
        self._build(config)
        self.checkpointed: frozenset[int] = frozenset()

    def _build(self, config: AutoencoderConfig) -> None:
        widths, style = config.widths, config.style
        self.conv_in = style.conv(config.in_channels, config.filters, bias=False)
        self.levels = nn.ModuleList(EncoderLevel(config, i) for i in range(len(widths)))
        self.mid_blocks = _blocks(config, widths[-1], widths[-1])
        self.norm_out = style.norm(widths[-1])
        self.conv_out = style.conv(widths[-1], config.latent_channels, 1)

    def forward(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        stride = 1 + self._config.temporal_downsample[0] if len(self.levels) > 1 else 1
        frames = video.shape[2] - 1
        if state is None and frames % stride == 0 and _in_pieces(self._config, video.shape, video):
            pieces = video.split(_cut(frames + 1, 1 + PIECE_FRAMES, PIECE_FRAMES), 2)
            x = in_chunks(self._finest, ((piece,) for piece in pieces), frames // stride + 1)
        else:
            x = self._finest(video, state)
        for i, level in enumerate(self.levels):
            if i > 0:
                x = _run(level, i in self.checkpointed, x, state)
        following = FollowingNorm(self.norm_out)
        x = run_blocks(self.mid_blocks, x, state, following)
        return norm_then(self.norm_out, self.conv_out, x, state, statistics=following.statistics)

    def _finest(self, video: Tensor, state: StreamState | None) -> Tensor:
        return _run(self.levels[0], 0 in self.checkpointed, self.conv_in(video, state), state)


class Decoder(nn.Module):
    """Quantized latent [B, D, T', H', W'] -> video [B, C, T, H, W], linear output."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self._config = config
        self._build(config)
        self.checkpointed: frozenset[int] = frozenset()

    def _build(self, config: AutoencoderConfig) -> None:
        widths, style = config.widths, config.style
        self.conv_in = style.conv(config.latent_channels, widths[-1])
        self.mid_blocks = _blocks(config, widths[-1], widths[-1])
        # In the order of execution: the deepest level first.
        self.levels = nn.ModuleList(DecoderLevel(config, i) for i in reversed(range(len(widths))))
        self.norm_out = style.norm(widths[0])
        self.conv_out = style.conv(widths[0], config.in_channels)

    def forward(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        x = run_blocks(self.mid_blocks, self.conv_in(latent, state), state)
        in_pieces = state is None and _in_pieces(self._config, self._clip(latent), latent)
        count = len(self.levels)
        for i, level in enumerate(self.levels[: count - 2] if in_pieces else self.levels):
            x = _run(level, count - 1 - i in self.checkpointed, x, latent, state)
        if in_pieces:
            return self._finest_in_pieces(x, latent)
        return norm_then(self.norm_out, self.conv_out, x, state)

    def _clip(self, latent: Tensor) -> tuple[int, ...]:
        """Shape of the video that a latent stands for."""
        b, _, t, h, w = latent.shape
        time, space = self._config.time_stride, self._config.space_stride
        return b, self._config.in_channels, time * (t - 1) + 1, space * h, space * w

    def _finest_in_pieces(self, x: Tensor, latent: Tensor) -> Tensor:
        """The last two levels, the finest and its up-sampling in pieces: [B, C, ...] -> video."""
        coarse, fine = self.levels[-2:]
        assert isinstance(coarse, DecoderLevel)
        up = coarse.up
        assert up is not None

        def finest(x: Tensor, latent: Tensor, state: StreamState) -> Tensor:
            y = fine(up(x, state), latent, state)
            return norm_then(self.norm_out, self.conv_out, y, state)

        x = coarse.before_up(x, latent, None)
        slots = max(PIECE_FRAMES // self._config.time_stride, 1)
        step = slots * coarse.factor[0]
        latents = latent.split(_cut(latent.shape[2], 1 + slots, slots), 2)
        frames = self._clip(latent)[2]
        return in_chunks(
            finest, zip(x.split(_cut(x.shape[2], 1 + step, step), 2), latents, strict=True), frames
        )


def _run(level: nn.Module, recompute: bool, *args: Tensor | StreamState | None) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpointed(level, *args)
    return level(*args)  # type: ignore[no-any-return]
