"""Orders of bits and parts of tokens, against their closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import magvit_fast as mf
from magvit_fast.compat.token_ids import merge_ids, reverse_bits, split_ids


def test_closed_forms() -> None:
    ids = torch.arange(2**18).view(2, 512, 256)
    assert all(torch.equal(p, ids // 512**k % 512) for k, p in enumerate(split_ids(ids, (9, 9))))
    low, high = split_ids(ids, (6, 12))
    assert torch.equal(low, ids % 64)
    assert torch.equal(high, ids // 64)
    small = torch.arange(8)
    assert reverse_bits(small, 3).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    text = [int(f"{i:018b}"[::-1], 2) for i in range(0, 2**18, 997)]
    assert reverse_bits(torch.arange(0, 2**18, 997), 18).tolist() == text


def test_orders_of_the_codes() -> None:
    ids = torch.arange(64).view(4, 16)
    codes = mf.ops.lfq_codes(ids, 6, bit_order="msb")
    assert torch.equal(codes, mf.ops.lfq_codes(reverse_bits(ids, 6), 6, bit_order="lsb"))
    low, high = split_ids(ids, (2, 4))  # the first part is the first channels
    lsb = mf.ops.lfq_codes(ids, 6)
    assert torch.equal(lsb[:, :2], mf.ops.lfq_codes(low, 2))
    assert torch.equal(lsb[:, 2:], mf.ops.lfq_codes(high, 4))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(0, 2**32))
def test_there_and_back(bits: list[int], seed: int) -> None:
    total = sum(bits)
    ids = torch.randint(0, 2**total, (3, 2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(reverse_bits(reverse_bits(ids, total), total), ids)
    parts = split_ids(ids, bits)
    assert all(int(p.max()) < 2**n for p, n in zip(parts, bits, strict=True))
    assert torch.equal(merge_ids(parts, bits), ids)


def test_wide_and_empty() -> None:
    ids = torch.tensor([2**62 - 1, 2**61, 1])
    assert reverse_bits(ids, 62).tolist() == [2**62 - 1, 1, 2**61]
    assert reverse_bits(torch.zeros(0, 3, dtype=torch.int64), 5).shape == (0, 3)


def test_bad_input() -> None:
    ids = torch.tensor([0, 8])
    with pytest.raises(ValueError, match=r"ids: expected 0..7 \(3 bits\), got values in 0..8"):
        reverse_bits(ids, 3)
    with pytest.raises(ValueError, match=r"ids: expected 0..7"):
        split_ids(-ids, (1, 2))
    with pytest.raises(TypeError, match=r"ids: expected dtype torch.int64"):
        reverse_bits(ids.int(), 4)
    with pytest.raises(ValueError, match="num_bits: expected 1 to 62, got 63"):
        reverse_bits(ids, 63)
    with pytest.raises(ValueError, match="sum of bits"):
        split_ids(ids, ())
    with pytest.raises(ValueError, match="parts: expected 2"):
        merge_ids([ids], (4, 4))
    with pytest.raises(ValueError, match=r"parts\[1\]: expected shape \(2,\)"):
        merge_ids([ids, ids[:1]], (4, 4))
    with pytest.raises(ValueError, match=r"parts\[1\]: expected 0..3"):
        merge_ids([ids, ids], (4, 2))
