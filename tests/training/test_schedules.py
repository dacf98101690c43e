"""Learning rate and weight averages against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from magvit_fast.training.ema import Ema
from magvit_fast.training.schedules import warmup_cosine


def test_warm_up_then_cosine_from_its_end():
    values = [warmup_cosine(step, warmup=4, total=12) for step in range(12)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0  # the cosine's clock starts here
    assert values[8] == pytest.approx(0.5)
    assert values[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert warmup_cosine(12, warmup=4, total=12) == 0.0
    assert warmup_cosine(99, warmup=4, total=12) == 0.0  # does not jump back
    assert warmup_cosine(0, warmup=0, total=1) == 1.0


def test_average_follows_the_weights():
    torch.manual_seed(0)
    source = nn.BatchNorm1d(3)
    ema = Ema(source, decay=0.9)
    expected = source.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            source.weight.add_(torch.randn(3))
            source.running_mean.add_(1)
        ema.update(source)
        expected = 0.9 * expected + 0.1 * source.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert torch.equal(ema.model.running_mean, source.running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    with pytest.raises(ValueError, match="decay"):
        Ema(source, decay=1.0)
