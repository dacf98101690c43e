"""Decoding: schedules, masked decoding, generation from a task."""

from __future__ import annotations

from magvit_fast.decoding.autoregressive import (
    AutoregressiveDecoding,
    decode_autoregressive,
)
from magvit_fast.decoding.generate import (
    clip_geometry,
    generate,
    generate_stream,
    generate_tokens,
)
from magvit_fast.decoding.masked import (
    DecodingState,
    MaskedDecoding,
    decode_masked,
    masked_decoding_steps,
)
from magvit_fast.decoding.maskvit import MaskViTDecoding, decode_frames
from magvit_fast.decoding.published import published
from magvit_fast.decoding.schedules import Guidance, mask_fraction, unknown_counts

__all__ = [
    "AutoregressiveDecoding",
    "DecodingState",
    "Guidance",
    "MaskViTDecoding",
    "MaskedDecoding",
    "clip_geometry",
    "decode_autoregressive",
    "decode_frames",
    "decode_masked",
    "generate",
    "generate_stream",
    "generate_tokens",
    "mask_fraction",
    "masked_decoding_steps",
    "published",
    "unknown_counts",
]
