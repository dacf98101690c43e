"""The MAGVIT-v2 tokenizer: a causal 3D autoencoder around a lookup-free quantizer.

Facts: MAGVIT-v2 (arXiv 2310.05737), section 3 and the appendix architecture figure; where the paper
is silent, Google's port of the original code. A clip has 1 + 4k frames for the published time
stride of 4: slot 0 of the latent is the first frame alone, slot s depends on frames 0 .. 4s only,
and an image is a clip of one frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.nn.conv import CausalConv3d
from magvit_fast.nn.norm import AdaptiveGroupNorm, GroupNormSiLU, group_count
from magvit_fast.nn.quantize import LFQ, EntropyKind
from magvit_fast.nn.resample import Downsample, Upsample
from magvit_fast.nn.stream import StreamState, rechunk
from magvit_fast.ops._checks import check_int, values_can_be_read


@dataclass(frozen=True)
class MagvitV2Config:
    """Everything that defines a tokenizer. The defaults are the published model.

    Attributes:
        filters: base width f.
        channel_multipliers: width of level i is f * channel_multipliers[i].
        temporal_downsample: whether the down-sampling after level i halves time too; one entry per
            level but the last.
        num_res_blocks: residual blocks per level (and once more beside the latent).
        num_bits: bits of a token = channels of the latent.
        in_channels: channels of the video.
        conv_shortcut: 3x3x3 instead of 1x1x1 shortcuts where a block changes the width.
        norm_groups: groups of every group norm (each channel its own where there are fewer).
            Below 64 filters the published 32 leave one channel a group, which takes the frame's
            mean color out of every layer; a few wide groups then learn much faster.
        num_token_groups, entropy_groups, entropy_weight, entropy_balance, commitment_weight,
            temperature, entropy_eps, entropy_kind: see nn.quantize.LFQ.
    """

    filters: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_res_blocks: int = 4
    num_bits: int = 18
    in_channels: int = 3
    conv_shortcut: bool = False
    norm_groups: int = 32
    num_token_groups: int = 1
    entropy_groups: int = 1
    entropy_weight: float = 0.1
    entropy_balance: float = 1.0
    commitment_weight: float = 0.25
    temperature: float = 0.01
    entropy_eps: float = 0.0
    entropy_kind: EntropyKind = "softmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        for name in ("filters", "in_channels", "num_res_blocks"):
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
        for width in self.widths:
            group_count(width, self.norm_groups)

    @property
    def causal(self) -> bool:
        """Slot 0 is the first frame alone (see tasks.ClipGeometry)."""
        return True

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.filters * m for m in self.channel_multipliers)

    @property
    def time_stride(self) -> int:
        """Frames per latent slot after the first."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def space_stride(self) -> int:
        """Pixels per latent cell, per axis."""
        return int(2 ** len(self.temporal_downsample))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the tokens of one clip; H' and W' round up."""
        s = self.space_stride
        return (frames - 1) // self.time_stride + 1, -(-height // s), -(-width // s)


@dataclass
class TokenizerOutput:
    """Result of a training forward pass.

    Attributes:
        reconstruction: [B, C, T, H, W], not clamped.
        ids: int64 [B, T', H', W'].
        z: the latent before the sign, [B, D, T', H', W'].
        losses: the quantizer's scalars, see nn.quantize.LFQOutput.
    """

    reconstruction: Tensor
    ids: Tensor
    z: Tensor
    losses: dict[str, Tensor]


class EncoderLevel(nn.Module):
    """Residual blocks of one width, then (but for the last level) down-sampling."""

    def __init__(self, config: MagvitV2Config, index: int) -> None:
        super().__init__()
        widths = config.widths
        entry = widths[max(index - 1, 0)]
        self.blocks = _blocks(config, entry, widths[index])
        last = index == len(widths) - 1
        self.down = (
            None if last else Downsample(widths[index], temporal=config.temporal_downsample[index])
        )

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, state)
        return x if self.down is None else self.down(x, state)


class DecoderLevel(nn.Module):
    """Adaptive norm, residual blocks of one width, then (but for level 0) up-sampling."""

    def __init__(self, config: MagvitV2Config, index: int) -> None:
        super().__init__()
        widths = config.widths
        entry = widths[min(index + 1, len(widths) - 1)]
        self.cond_norm = AdaptiveGroupNorm(entry, config.num_bits, groups=config.norm_groups)
        self.blocks = _blocks(config, entry, widths[index])
        self.up = (
            None
            if index == 0
            else Upsample(widths[index], temporal=config.temporal_downsample[index - 1])
        )
        # How much finer than the latent this level's grid is.
        above = config.temporal_downsample[index:]
        self.factor = (2 ** sum(above), 2 ** len(above), 2 ** len(above))

    def forward(self, x: Tensor, latent: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.cond_norm(x, latent, self.factor)
        for block in self.blocks:
            x = block(x, state)
        return x if self.up is None else self.up(x, state)


def _blocks(config: MagvitV2Config, in_channels: int, out_channels: int) -> nn.ModuleList:
    count = config.num_res_blocks
    widths = [in_channels] + [out_channels] * count
    return nn.ModuleList(
        ResBlock3d(
            widths[i],
            widths[i + 1],
            conv_shortcut=config.conv_shortcut,
            norm_groups=config.norm_groups,
        )
        for i in range(count)
    )


class Encoder(nn.Module):
    """[B, C, T, H, W] -> latent [B, D, T', H', W'] before the sign. Odd sizes round up per level."""

    def __init__(self, config: MagvitV2Config) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3, bias=False)
        self.levels = nn.ModuleList(EncoderLevel(config, i) for i in range(len(widths)))
        self.mid_blocks = _blocks(config, widths[-1], widths[-1])
        self.norm_out = GroupNormSiLU(widths[-1], groups=config.norm_groups)
        self.conv_out = CausalConv3d(widths[-1], config.num_bits, 1)
        self.checkpointed: frozenset[int] = frozenset()

    def forward(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.conv_in(video, state)
        for i, level in enumerate(self.levels):
            x = _run(level, i in self.checkpointed, x, state)
        for block in self.mid_blocks:
            x = block(x, state)
        out: Tensor = self.conv_out(self.norm_out(x), state)
        return out


class Decoder(nn.Module):
    """Latent [B, D, T', H', W'] of -1 / +1 -> video [B, C, T, H, W], linear output."""

    def __init__(self, config: MagvitV2Config) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.num_bits, widths[-1], 3)
        self.mid_blocks = _blocks(config, widths[-1], widths[-1])
        # In the order of execution: the deepest level first.
        self.levels = nn.ModuleList(DecoderLevel(config, i) for i in reversed(range(len(widths))))
        self.norm_out = GroupNormSiLU(widths[0], groups=config.norm_groups)
        self.conv_out = CausalConv3d(widths[0], config.in_channels, 3)
        self.checkpointed: frozenset[int] = frozenset()

    def forward(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.conv_in(latent, state)
        for block in self.mid_blocks:
            x = block(x, state)
        for i, level in enumerate(self.levels):
            depth = len(self.levels) - 1 - i
            x = _run(level, depth in self.checkpointed, x, latent, state)
        out: Tensor = self.conv_out(self.norm_out(x), state)
        return out


def _positive(name: str, value: int) -> int:
    if check_int(name, value) < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return value


def _run(level: nn.Module, recompute: bool, *args: Tensor | StreamState | None) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(level, *args, use_reentrant=False)  # type: ignore[no-any-return]
    return level(*args)  # type: ignore[no-any-return]


class MagvitV2Tokenizer(PretrainedMixin):
    """Video <-> tokens. Videos are [B, C, T, H, W] in [0, 1]; ids int64 [B, T', H', W'].

    Videos of any floating dtype are taken; what comes out has the dtype of the weights.

    Example:
        >>> tokenizer = MagvitV2Tokenizer.from_preset("magvit-v2-demo").eval()
        >>> ids = tokenizer.encode(torch.rand(1, 3, 17, 64, 64))   # [1, 5, 8, 8]
        >>> video = tokenizer.decode(ids)                          # [1, 3, 17, 64, 64]
    """

    config_class = MagvitV2Config

    def __init__(self, config: MagvitV2Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = LFQ(
            config.num_bits,
            num_token_groups=config.num_token_groups,
            entropy_groups=config.entropy_groups,
            entropy_weight=config.entropy_weight,
            entropy_balance=config.entropy_balance,
            commitment_weight=config.commitment_weight,
            temperature=config.temperature,
            entropy_eps=config.entropy_eps,
            entropy_kind=config.entropy_kind,
        )

    # ---- the whole clip -------------------------------------------------------------------------
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
        """Video [B, C, 1 + s_t k, H, W] in [0, 1] -> ids int64 [B, 1 + k, H', W'].

        Raises:
            TypeError: the video is no floating-point Tensor.
            ValueError: wrong number of axes, channels or frames; H or W no multiple of the space
                stride; NaN or infinite pixels.
        """
        z = self.encoder(self._check_finite(self._check_video(video)))
        ids: Tensor = self.quantizer(z, with_losses=False).ids
        return ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T', H', W'] -> video [B, C, 1 + s_t (T' - 1), s_h H', s_w W'], clamped to
        [0, 1].

        Raises:
            TypeError: ids are not int64.
            ValueError: ids are not 4-D or outside 0 .. 2**num_bits - 1.
        """
        video: Tensor = self.decoder(self._latent(ids))
        return video.clamp(0, 1)

    # ---- chunk by chunk -------------------------------------------------------------------------
    def encode_stream(
        self,
        frames: Tensor | Iterable[Tensor],
        *,
        state: StreamState | None = None,
        chunk_slots: int = 4,
    ) -> Iterator[Tensor]:
        """Encode a video of any length with a memory that does not grow.

        Args:
            frames: the video [B, C, T, H, W], or pieces of it of any lengths along T.
            state: memory of the stream; one made for this call unless given. After the last chunk
                it can be given to a further call, which then continues the same video (with a
                multiple of s_t frames).
            chunk_slots: at most so many latent slots are computed at once.

        Yields:
            ids int64 [B, n, H', W']; their concatenation along axis 1 equals `encode` of the whole.

        Raises:
            TypeError, ValueError: as `encode`, when the offending piece is reached; and at the end
                if the whole length is not 1 + s_t k.
        """
        state, step = StreamState() if state is None else state, self.config.time_stride
        pieces = [frames] if isinstance(frames, Tensor) else frames
        most = _positive("chunk_slots", chunk_slots) * step
        for chunk in rechunk(pieces, 2, step=step, most=most, started=state.started, name="frames"):
            yield self._encode_chunk(chunk, state)

    def decode_stream(
        self,
        ids: Tensor | Iterable[Tensor],
        *,
        state: StreamState | None = None,
        chunk_slots: int = 4,
    ) -> Iterator[Tensor]:
        """Decode tokens of any length with a memory that does not grow.

        Args:
            ids: int64 [B, T', H', W'], or pieces of it of any lengths along T'.
            state, chunk_slots: as in `encode_stream`.

        Yields:
            video [B, C, n, H, W] in [0, 1]; the concatenation along axis 2 equals `decode` of the
            whole.

        Raises:
            TypeError, ValueError: as `decode`, when the offending piece is reached.
        """
        state = StreamState() if state is None else state
        pieces = [ids] if isinstance(ids, Tensor) else ids
        most = _positive("chunk_slots", chunk_slots)
        for chunk in rechunk(pieces, 1, step=1, most=most, started=state.started, name="ids"):
            yield self._decode_chunk(chunk, state)

    @torch.no_grad()
    def _encode_chunk(self, chunk: Tensor, state: StreamState) -> Tensor:
        z = self.encoder(self._check_finite(self._check_video(chunk, whole=False)), state)
        state.started = True
        ids: Tensor = self.quantizer(z, with_losses=False).ids
        return ids

    @torch.no_grad()
    def _decode_chunk(self, chunk: Tensor, state: StreamState) -> Tensor:
        video: Tensor = self.decoder(self._latent(chunk), state)
        state.started = True
        return video.clamp(0, 1)

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

    # ---- checks ---------------------------------------------------------------------------------
    def _check_video(self, video: Tensor, *, whole: bool = True) -> Tensor:
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
        if whole and (t < 1 or t % step != 1 % step):
            raise ValueError(
                f"video: expected 1 + {step}k frames (1, {1 + step}, {1 + 2 * step}, ...), got {t}"
            )
        if h < 1 or w < 1 or h % s or w % s:
            raise ValueError(f"video: expected height and width in multiples of {s}, got {h} x {w}")
        dtype = self.encoder.conv_in.weight.dtype
        return video.to(dtype).contiguous(memory_format=torch.channels_last_3d)

    @staticmethod
    def _check_finite(video: Tensor) -> Tensor:
        # Tokens of a damaged frame would look like any others.
        if values_can_be_read(video) and not torch.isfinite(video).all():
            raise ValueError("video: expected finite values, got NaN or infinity")
        return video

    def _latent(self, ids: Tensor) -> Tensor:
        codes = self.quantizer.codes(ids)
        if ids.dim() != 4 or min(ids.shape[1:]) < 1:
            raise ValueError(f"ids: expected [B, T', H', W'], got {tuple(ids.shape)}")
        dtype = self.decoder.conv_in.weight.dtype
        return codes.to(dtype).contiguous(memory_format=torch.channels_last_3d)
