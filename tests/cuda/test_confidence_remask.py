"""The CUDA kernels of confidence_remask against the reference that draws the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal


def _problem(
    batch: int, length: int, groups: int, values: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(batch, length, groups, values) * 2
    tokens = torch.randint(values**groups, (batch, length))
    unknown = torch.rand(batch, length) < 0.7
    return logits.to(device, dtype), tokens.to(device), unknown.to(device)


SIZES = [(2, 40, 2, 16), (1, 33, 1, 128), (3, 5, 3, 1), (2, 17, 4, 2), (1, 700, 1, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "choice_temperature": 4.5, "seed": 2**40 + 3, "step": 5},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_same_tokens_as_the_reference(
    size: tuple[int, int, int, int], dtype: torch.dtype, options: dict[str, Any],
    device: torch.device,
) -> None:  # fmt: skip
    logits, tokens, unknown = _problem(*size, dtype, device)
    count = torch.arange(size[0], device=device) * 3 + 2
    actual = mf.confidence_remask(
        logits, tokens, unknown, num_unknown=count, impl="native", **options
    )
    expected = mf.confidence_remask(
        logits, tokens, unknown, num_unknown=count, impl="reference", **options
    )
    assert_equal(actual[0], expected[0], name="tokens")
    assert_equal(actual[1], expected[1], name="unknown")
    assert_equal(actual[0][~unknown], tokens[~unknown], name="known tokens")
    kept = torch.minimum(count, unknown.sum(1))
    assert_equal(actual[1].sum(1), kept, name="how many stay unknown")


def test_given_noise_and_ties(device: torch.device) -> None:
    logits, tokens, unknown = _problem(2, 30, 2, 8, torch.float32, device)
    logits.zero_()  # all confidences are equal: the lowest positions stay unknown
    noise = (torch.rand_like(logits), torch.zeros(2, 30, device=device))
    new_tokens, still = mf.confidence_remask(
        logits, tokens, unknown, num_unknown=5, choice_temperature=1.0, noise=noise, impl="native"
    )
    shifts = torch.tensor([0, 3], device=device)
    sampled = (noise[0].argmax(-1) << shifts).sum(-1)
    assert_equal(new_tokens, torch.where(unknown, sampled, tokens))
    assert_equal(still, unknown & (unknown.cumsum(1) <= 5))


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_how_many_stay_unknown(count: int, device: torch.device) -> None:
    logits, tokens, unknown = _problem(1, 300, 1, 8, torch.float32, device)
    counts = torch.tensor([count], device=device)
    _, still = mf.confidence_remask(logits, tokens, unknown, num_unknown=counts, impl="native")
    assert int(still.sum()) == min(count, int(unknown.sum()))
    assert not bool((still & ~unknown).any())
