"""Token ids of other projects: the order of their bits, and tokens split into parts.

    ids = reverse_bits(theirs, 18)                 # most significant first <-> least significant first
    ids = merge_ids([low, high], (9, 9))           # parts of a token <-> the token
    low, high = split_ids(ids, (9, 9))

An id of lookup-free quantization is sum_c bit_c 2**place(c). Channel 0 is the least significant place
in the paper, Google's port, this package, Open-MAGVIT2 and the Genie baseline of 1X; it is the most
significant one in vector-quantize-pytorch, magvit2-pytorch, O2-MAGVIT2 and BSQ-ViT. The order says
nothing about a value: ids of both look alike, and decode to different videos.

Parts take the bits of a token in turn, the least significant first: Open-MAGVIT2's two halves (bits
(9, 9), or (6, 12) in its transformers; the first half is the first channels) and the factorized
vocabularies of 1X, id // 512**k % 512 for part k, are both `split_ids(ids, (9, 9))`. Ids that are
most significant first are reversed before.

Ids of Open-MAGVIT2 are flat; they are in the order of [B, T', H', W'] and can be reshaped to that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magvit_fast.ops._checks import check_int, check_tensor, values_can_be_read

MAX_BITS = 62


def reverse_bits(ids: Tensor, num_bits: int) -> Tensor:
    """The same tokens with their bits in the opposite order: bit c becomes bit num_bits - 1 - c.

    Args:
        ids: int64 of any shape, in 0 .. 2**num_bits - 1.
        num_bits: bits of a token, 1 to 62.

    Returns:
        int64 of the same shape. Its own inverse.

    Raises:
        TypeError: ids are no int64 tensor, or num_bits is no int.
        ValueError: num_bits or an id is out of range.
    """
    _check_ids("ids", ids, _check_bits("num_bits", num_bits))
    places = torch.arange(num_bits, device=ids.device)
    bits = (ids.unsqueeze(-1) >> places) & 1
    reversed_ids: Tensor = (bits << places.flip(0)).sum(-1)
    return reversed_ids


def split_ids(ids: Tensor, bits: Sequence[int]) -> tuple[Tensor, ...]:
    """Tokens -> one tensor for each part, the least significant bits first.

    Args:
        ids: int64 of any shape, in 0 .. 2**sum(bits) - 1.
        bits: bits of each part.

    Raises:
        TypeError, ValueError: as `reverse_bits`; or bits are empty or not positive.
    """
    _check_ids("ids", ids, _check_parts(bits))
    shifts = [sum(bits[:i]) for i in range(len(bits))]
    return tuple((ids >> s) & ((1 << n) - 1) for s, n in zip(shifts, bits, strict=True))


def merge_ids(parts: Sequence[Tensor], bits: Sequence[int]) -> Tensor:
    """The inverse of `split_ids`: int64 parts of one shape -> tokens of that shape.

    Raises:
        TypeError, ValueError: as `split_ids`; or there are not as many parts as bits.
    """
    _check_parts(bits)
    if len(parts) != len(bits):
        raise ValueError(f"parts: expected {len(bits)} (one for each of bits), got {len(parts)}")
    for i, (part, count) in enumerate(zip(parts, bits, strict=True)):
        _check_ids(f"parts[{i}]", part, count)
        if part.shape != parts[0].shape:
            raise ValueError(
                f"parts[{i}]: expected shape {tuple(parts[0].shape)} as parts[0], "
                f"got {tuple(part.shape)}"
            )
    ids = torch.zeros_like(parts[0])
    for i, part in enumerate(parts):
        ids = ids | (part << sum(bits[:i]))
    return ids


def _check_bits(name: str, value: int) -> int:
    if check_int(name, value, least=1) > MAX_BITS:
        raise ValueError(f"{name}: expected 1 to {MAX_BITS}, got {value}")
    return value


def _check_parts(bits: Sequence[int]) -> int:
    for i, count in enumerate(bits):
        check_int(f"bits[{i}]", count, least=1)
    return _check_bits("sum of bits", sum(bits))


def _check_ids(name: str, ids: Tensor, num_bits: int) -> None:
    check_tensor(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {ids.dtype}")
    if values_can_be_read(ids):
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >> num_bits:
            raise ValueError(
                f"{name}: expected 0..{(1 << num_bits) - 1} ({num_bits} bits), "
                f"got values in {low}..{high}"
            )
