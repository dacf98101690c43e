"""The CUDA kernels of group_norm_silu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.problem_files import problems
from tests.ops.test_group_norm_silu import check_against_float64

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal


@pytest.mark.parametrize("problem", problems("group_norm_silu", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(
    problem: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    check_against_float64(problem, dtype, device.type)


def test_many_channels_and_a_large_mean(device: torch.device) -> None:
    x = (torch.randn(1, 320, 2, 3, 5) + 1e3).to(device)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    y = mf.group_norm_silu(x, 32, activation=None, impl="native")
    exact = mf.group_norm_silu(x.double(), 32, activation=None)
    assert float((y - exact).abs().max()) < 2e-5
    assert_equal(mf.group_norm_silu(x, 32, activation=None, impl="native"), y)


def test_an_empty_batch(device: torch.device) -> None:
    x = torch.empty(0, 4, 2, 3, 3, device=device)
    assert mf.group_norm_silu(x, 2, impl="native").shape == x.shape
