"""What all video tokenizers share: whole clips, streams, recomputation, checks.

A tokenizer is an encoder, a quantizer and a decoder under a config; the systems' own files say
which. Videos are [B, C, T, H, W] in [0, 1]; ids int64 [B, T', H', W'].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from magvit_fast.models.autoencoder import AutoencoderConfig, Decoder, Encoder
from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.nn.stream import StreamState, rechunk
from magvit_fast.ops._checks import check_int, values_can_be_read


@dataclass
class TokenizerOutput:
    """Result of a training forward pass.

    Attributes:
        reconstruction: [B, C, T, H, W], not clamped.
        ids: int64 [B, T', H', W'].
        z: the latent before it is quantized, [B, D, T', H', W'].
        losses: the quantizer's scalars, see nn.quantize.LFQOutput and
            nn.vector_quantize.VQOutput.
    """

    reconstruction: Tensor
    ids: Tensor
    z: Tensor
    losses: dict[str, Tensor]


class VideoTokenizer(PretrainedMixin):
    """Video <-> tokens. Videos of any floating dtype are taken; results have the weights' dtype.

    A causal tokenizer takes 1 + s_t k frames for its time stride s_t and makes 1 + k slots (an
    image is a clip of one frame); any other takes s_t k frames and makes k slots, each of which
    sees the whole clip unless the tokenizer works frame by frame.
    """

    config: AutoencoderConfig
    encoder_class: ClassVar[type[Encoder]] = Encoder
    decoder_class: ClassVar[type[Decoder]] = Decoder

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = self.encoder_class(config)
        self.decoder = self.decoder_class(config)
        self.quantizer = config.new_quantizer()

    # ---- the whole clip -------------------------------------------------------------------------
    def forward(self, video: Tensor) -> TokenizerOutput:
        """One training pass.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        z = self.encoder(self._check_video(video))
        quantized = self.quantizer(z)
        reconstruction = self._pixels(self.decoder(quantized.quantized))
        return TokenizerOutput(reconstruction, quantized.ids, z, quantized.losses)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, C, T, H, W] in [0, 1] -> ids int64 [B, T', H', W'].

        Integers have no gradient, so that no activation is kept for one; `forward` has it.

        Raises:
            TypeError: the video is no floating-point Tensor.
            ValueError: wrong number of axes, channels or frames; H or W no multiple of the space
                stride; NaN or infinite pixels.
        """
        return self._ids(self._check_video(video))

    def decode(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T', H', W'] -> video [B, C, T, s_h H', s_w W'], clamped to [0, 1].

        T is 1 + s_t (T' - 1) for a causal tokenizer and s_t T' for any other.

        Raises:
            TypeError: ids are not int64.
            ValueError: ids are not 4-D or outside the vocabulary.
        """
        return self._video(ids)

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
            Up to rounding: a kernel may sum a chunk in another order than the whole. In float32 a bit
            may differ where its latent lies within 1e-5 of the largest |z| around zero (differences of
            2e-6 seen with random weights of "magvit-v2-small").

        Raises:
            TypeError, ValueError: as `encode`, when the offending piece is reached; and at the end
                if the whole length is not 1 + s_t k.
            NotImplementedError: the tokenizer looks ahead in time.
        """
        self._check_streams("encode")
        state, step = StreamState() if state is None else state, self.config.time_stride
        pieces = [frames] if isinstance(frames, Tensor) else frames
        most = check_int("chunk_slots", chunk_slots, least=1) * step
        chunks = rechunk(pieces, 2, step=step, most=most, started=state.started, name="frames")
        return (self._encode_chunk(chunk, state) for chunk in chunks)

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
            whole up to rounding (2e-5 in float32).

        Raises:
            TypeError, ValueError: as `decode`, when the offending piece is reached.
            NotImplementedError: the tokenizer looks ahead in time.
        """
        self._check_streams("decode")
        state = StreamState() if state is None else state
        pieces = [ids] if isinstance(ids, Tensor) else ids
        most = check_int("chunk_slots", chunk_slots, least=1)
        chunks = rechunk(pieces, 1, step=1, most=most, started=state.started, name="ids")
        return (self._decode_chunk(chunk, state) for chunk in chunks)

    @property
    def streams(self) -> bool:
        """Whether chunks can be encoded and decoded before the last frame is there."""
        return self.config.streams

    @torch.no_grad()
    def _encode_chunk(self, chunk: Tensor, state: StreamState) -> Tensor:
        ids = self._ids(self._check_video(chunk, whole=False), state)
        state.started = True
        return ids

    @torch.no_grad()
    def _decode_chunk(self, chunk: Tensor, state: StreamState) -> Tensor:
        video = self._video(chunk, state)
        state.started = True
        return video

    # ---- both ways ------------------------------------------------------------------------------
    def _ids(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        # Tokens of a damaged frame would look like any others.
        if values_can_be_read(video) and not torch.isfinite(video).all():
            raise ValueError("video: expected finite values, got NaN or infinity")
        ids: Tensor = self.quantizer(self.encoder(video, state), with_losses=False).ids
        return ids

    def _video(self, ids: Tensor, state: StreamState | None = None) -> Tensor:
        codes = self.quantizer.codes(ids)
        if ids.dim() != 4 or min(ids.shape[1:]) < 1:
            raise ValueError(f"ids: expected [B, T', H', W'], got {tuple(ids.shape)}")
        codes = codes.to(self.decoder.conv_in.weight.dtype)
        latent = codes.contiguous(memory_format=torch.channels_last_3d)
        return self._pixels(self.decoder(latent, state)).clamp(0, 1)

    def _pixels(self, decoded: Tensor) -> Tensor:
        return (decoded + 1) / 2 if self.config.signed_pixels else decoded

    # ---- settings and checks --------------------------------------------------------------------
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

    def _check_streams(self, verb: str) -> None:
        if not self.streams:
            why = "its norms span the clip: " if self.config.causal else ""
            raise NotImplementedError(
                f"{verb}_stream: this tokenizer is not causal ({why}every token depends on all "
                f"frames of its clip); cut the video into clips and {verb} each of them, or use a "
                "causal MagvitV2Tokenizer, which streams"
            )

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
        if whole and (t < 1 or (t - int(self.config.causal)) % step):
            expected = (
                f"1 + {step}k frames (1, {1 + step}, {1 + 2 * step}, ...)"
                if self.config.causal
                else f"a multiple of {step} frames"
            )
            raise ValueError(f"video: expected {expected}, got {t}")
        if h < 1 or w < 1 or h % s or w % s:
            raise ValueError(f"video: expected height and width in multiples of {s}, got {h} x {w}")
        if self.config.signed_pixels:
            video = video * 2 - 1
        dtype = self.encoder.conv_in.weight.dtype
        return video.to(dtype).contiguous(memory_format=torch.channels_last_3d)
