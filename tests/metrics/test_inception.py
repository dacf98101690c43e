"""Inception score against TF-GAN's numbers, a direct sum and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.goldens import load_goldens
from torch import Tensor

from magvit_fast.metrics import ClassStatistics, inception_score, spread


def _golden(name: str) -> Tensor:
    return torch.from_numpy(load_goldens("magvit_v1/09_metrics")[name])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_tfgan(dtype: str) -> None:
    got = inception_score(_golden("logits").to(getattr(torch, dtype)))
    expected = float(_golden(f"inception_score_{dtype}"))
    assert got == pytest.approx(expected, rel=1e-6 if dtype == "float32" else 1e-12)


def test_repeats() -> None:
    values = [inception_score(part) for part in _golden("logits").view(4, 50, 101)]
    got = torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(got, _golden("is_4repeats"), rtol=1e-6, atol=0)
    stated = torch.tensor(spread(values), dtype=torch.float32)
    torch.testing.assert_close(stated, _golden("is_4repeats_mean_std"), rtol=1e-5, atol=0)


def test_against_a_direct_sum() -> None:
    logits = np.random.default_rng(0).normal(size=(17, 6)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(torch.from_numpy(logits)) == pytest.approx(expected, rel=1e-12)


def test_limits() -> None:
    assert inception_score(torch.eye(10) * 1e4) == pytest.approx(10.0, rel=1e-12)
    assert inception_score(torch.zeros(8, 5)) == pytest.approx(1.0, rel=1e-12)
    assert inception_score(torch.randn(1, 5)) == pytest.approx(1.0, rel=1e-12)


def test_batches_add_up() -> None:
    logits = _golden("logits")
    statistics = ClassStatistics()
    for part in logits.split([1, 99, 60, 40]):
        statistics.update(part)
    assert statistics.score() == pytest.approx(inception_score(logits), rel=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"logits: expected \[N, D\]"):
        inception_score(torch.randn(5))
    with pytest.raises(ValueError, match="at least 1 sample"):
        inception_score(torch.randn(0, 5))
    with pytest.raises(ValueError, match="finite"):
        inception_score(torch.tensor([[0.0, -math.inf]]))
    statistics = ClassStatistics()
    statistics.update(torch.randn(2, 5))
    with pytest.raises(ValueError, match="K = 5 as before, got 4"):
        statistics.update(torch.randn(2, 4))
