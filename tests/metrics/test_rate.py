"""Codebook use and bit rates against closed forms and the numbers of the papers."""

from __future__ import annotations

import math

import pytest
import torch

from magvit_fast.metrics import (
    bits_per_pixel,
    codebook_counts,
    codebook_perplexity,
    codebook_usage,
    entropy_coded_bits,
    fixed_length_bits,
)


def test_uniform_use() -> None:
    counts = codebook_counts(torch.arange(64).repeat(3).view(3, 4, 4, 4), 64)
    assert counts.tolist() == [3] * 64
    assert codebook_usage(counts) == 1.0
    assert codebook_perplexity(counts) == pytest.approx(64.0)


def test_single_code_and_no_token() -> None:
    counts = codebook_counts(torch.full((1, 2, 3, 4), 5), 8)
    assert (codebook_usage(counts), codebook_perplexity(counts)) == (1 / 8, pytest.approx(1.0))
    empty = codebook_counts(torch.empty(0, 2, 3, 4, dtype=torch.int64), 8)
    assert (codebook_usage(empty), codebook_perplexity(empty)) == (0.0, 0.0)


def test_two_codes_three_to_one() -> None:
    counts = codebook_counts(torch.tensor([0, 0, 0, 1]), 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert codebook_usage(counts) == 0.5
    assert codebook_perplexity(counts) == pytest.approx(math.exp(entropy))


def test_counts_add_up() -> None:
    ids = torch.randint(0, 32, (4, 2, 3, 3))
    parts = sum(codebook_counts(part, 32) for part in ids)
    assert torch.equal(parts, codebook_counts(ids, 32))  # type: ignore[arg-type]


def test_bad_ids() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 8\), got 0 to 8"):
        codebook_counts(torch.arange(9), 8)
    with pytest.raises(ValueError, match="got -1"):
        codebook_counts(torch.tensor([-1]), 8)
    with pytest.raises(TypeError, match="integer"):
        codebook_counts(torch.rand(3), 8)
    with pytest.raises(ValueError, match="num_codes"):
        codebook_counts(torch.arange(2), 0)


@pytest.mark.parametrize(
    ("tokens", "bits", "frames", "expected"),
    [
        (4 * 16 * 16, 10, 16, 0.0390625),  # MAGVIT
        (4 * 16 * 16, 18, 16, 0.0703125),  # MAGVIT-v2, steady state
        (5 * 16 * 16, 18, 17, 0.0827),  # MAGVIT-v2, one 17-frame clip
    ],
)
def test_fixed_length_rates_of_the_papers(
    tokens: int, bits: int, frames: int, expected: float
) -> None:
    rate = bits_per_pixel(fixed_length_bits(tokens, bits), frames, 128, 128)
    assert rate == pytest.approx(expected, abs=5e-5)


def test_rate_needs_pixels() -> None:
    with pytest.raises(ValueError, match="frames, height, width"):
        bits_per_pixel(1, 0, 4, 4)


def test_entropy_coder_by_simulation() -> None:
    """The closed form equals coding bit after bit with counts that start at one half."""
    ids = torch.randint(0, 8, (37,), generator=torch.Generator().manual_seed(0)) & 5
    length = 0.0
    for position in range(3):
        seen = [0.5, 0.5]
        for bit in ((ids >> position) & 1).tolist():
            length -= math.log2(seen[bit] / sum(seen))
            seen[bit] += 1
    assert entropy_coded_bits(ids, 3) == pytest.approx(length, abs=1e-9)


def test_entropy_coder_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    fair = torch.randint(0, 2**12, (20_000,), generator=generator)
    assert entropy_coded_bits(fair, 12) == pytest.approx(fixed_length_bits(20_000, 12), rel=2e-3)
    constant = torch.full((2, 100, 10, 10), 1234)
    assert entropy_coded_bits(constant, 12) < 12 * 10
    assert entropy_coded_bits(torch.empty(0, dtype=torch.int64), 12) == 0.0
    with pytest.raises(ValueError, match=r"in \[0, 2\*\*3\)"):
        entropy_coded_bits(torch.tensor([8]), 3)
