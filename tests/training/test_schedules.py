"""Learning rate and weight averages against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from tests.goldens import load_goldens
from torch import nn

from magvit_fast.training.ema import Ema
from magvit_fast.training.schedules import warmup_cosine


def test_warm_up_then_cosine_from_its_end():
    values = [warmup_cosine(step, warmup=4, total=12) for step in range(12)]
    assert values[:4] == [0.0, 0.25, 0.5, 0.75]
    assert values[4] == 1.0  # the cosine's clock starts here
    assert values[8] == pytest.approx(0.5)
    assert values[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert warmup_cosine(12, warmup=4, total=12) == 0.0
    assert warmup_cosine(99, warmup=4, total=12) == 0.0  # does not jump back
    assert warmup_cosine(0, warmup=0, total=1) == 1.0


def test_rates_of_the_released_configs():
    golden = load_goldens("magvit_v1/11_lr_schedule")
    configs = sorted({name.split("/")[0] for name in golden})
    assert len(configs) == 5
    for config in configs:
        warmup, total, base = (golden[f"{config}/{k}"].item() for k in ("warmup", "total", "base"))
        for step, rate in zip(golden[f"{config}/steps"], golden[f"{config}/lr"], strict=True):
            ours = base * warmup_cosine(int(step), warmup=warmup, total=total)
            if step < total:
                assert ours == pytest.approx(rate, rel=1e-5, abs=1e-10), (config, step)
            else:  # the release starts again at the base rate
                assert (ours, rate) == (0.0, pytest.approx(base))


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
