"""Bits per pixel of a token stream: fixed length, and with an entropy coder.

Systems are compared at equal rate; which of the two rates is meant changes the picture, so both
are named. (MAGVIT-v2 has 0.0703 bits per pixel at fixed length; its paper compares systems at
0.0384, and how its tokens get there is not published.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bits_per_pixel(bits: float, frames: int, height: int, width: int) -> float:
    """`bits` over the number of pixels (positions, not color values) of a video."""
    pixels = frames * height * width
    if pixels < 1:
        raise ValueError(f"frames, height, width: expected >= 1, got {(frames, height, width)}")
    return bits / pixels


def fixed_length_bits(num_tokens: int, num_bits: int) -> int:
    """Every token at its full width of `num_bits` = D bits."""
    return num_tokens * num_bits


def entropy_coded_bits(ids: Tensor, num_bits: int) -> float:
    """Length of the stream under an adaptive binary arithmetic coder, one context a bit position.

    Each of the D bits of a token has its own adaptive model (Krichevsky-Trofimov, counts start at
    one half), which a decoder can follow: the rate is achievable and includes the cost of learning
    the statistics, unlike the empirical entropy of the ids, which is near log2(number of tokens)
    for any short clip. No context between tokens is used; a learned prior would go lower.

    Args:
        ids: int64 tensor of any shape (bits little-endian), values in [0, 2**num_bits).
        num_bits: D.

    Returns:
        Bits in all (a coder adds less than 3 more); 0 without tokens.

    Raises:
        ValueError: ids that are not integers or out of range.
    """
    total = ids.numel()
    if total == 0:
        return 0.0
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >> num_bits:
        raise ValueError(
            f"ids: expected integers in [0, 2**{num_bits}), got dtype {ids.dtype}, "
            f"values {ids.min()} to {ids.max()}"
        )
    bits = (
        ids.reshape(1, -1) >> torch.arange(num_bits, device=ids.device).unsqueeze(1) & 1
    )  # [D, N]
    ones = bits.sum(dim=1).double()  # [D]
    log_probability = (
        torch.lgamma(ones + 0.5)
        + torch.lgamma(total - ones + 0.5)
        - math.log(math.pi)
        - math.lgamma(total + 1)
    )
    return float(-log_probability.sum() / math.log(2.0))
