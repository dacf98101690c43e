"""The CUDA kernels of group_norm_silu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.problem_files import problems
from tests.ops.test_group_norm_silu import check_against_float64

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal, assert_within_budget


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


@pytest.mark.parametrize("channels", [24, 5])
@pytest.mark.parametrize("per_frame", [True, False])
def test_ready_statistics(per_frame: bool, channels: int, device: torch.device) -> None:
    """They stand for those that the op makes: bit for bit, and in the gradients."""
    x = (torch.randn(2, channels, 3, 5, 6, device=device) + 2).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, device=device)
    groups = channels // 4 if channels % 4 == 0 else channels
    made = torch.ops.magvit_fast.group_norm_silu(
        x, weight, None, None, None, 1e-6, [1, 1, 1], groups, per_frame, True
    )[1]
    found = []
    for statistics in (None, made):
        leaves = [v.detach().requires_grad_() for v in (x, weight)]
        y = mf.group_norm_silu(
            leaves[0], groups, leaves[1], per_frame=per_frame, statistics=statistics, impl="native"
        )
        found.append((y, *torch.autograd.grad(y.float().sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert_equal(a, b)


def test_an_outlier_where_sums_begin_costs_no_digits(device: torch.device) -> None:
    x = torch.randn(1, 16, 1, 32, 32)
    x[:, :, :, 0, 0] = 1e4
    x = x.contiguous(memory_format=torch.channels_last_3d).to(device)
    y = mf.group_norm_silu(x, 4, activation=None, impl="native")
    exact = mf.group_norm_silu(x.double(), 4, activation=None)
    plain = mf.group_norm_silu(x, 4, activation=None, impl="reference")
    assert_within_budget(y, plain, exact)


@pytest.mark.parametrize("size", [(3, 1, 1), (1, 1, 1), (1, 4, 1)])
def test_maps_of_whole_rows(size: tuple[int, int, int], device: torch.device) -> None:
    """Scale and shift that hold for rows of a frame, a frame, or the clip."""
    x = torch.randn(2, 16, 3, 8, 6, device=device)
    scale, shift = (torch.randn(2, 16, *size, device=device) for _ in range(2))
    dy = torch.randn_like(x)
    found = []
    for impl, dtype in (("native", x.dtype), ("reference", x.dtype), ("reference", torch.double)):
        leaves = [v.to(dtype).requires_grad_() for v in (x, scale, shift)]
        y = mf.group_norm_silu(leaves[0], 4, scale=leaves[1], shift=leaves[2], impl=impl,
                               factor=(1, 8 // size[1] if size[1] > 1 else 1, 1))  # fmt: skip
        found.append((y, *torch.autograd.grad(y, leaves, dy.to(dtype))))
    for values in zip(*found, strict=True):
        assert_within_budget(*values)


def test_an_empty_batch(device: torch.device) -> None:
    x = torch.empty(0, 4, 2, 3, 3, device=device)
    assert mf.group_norm_silu(x, 2, impl="native").shape == x.shape
