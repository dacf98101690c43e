"""The CUDA kernels of depth_to_space3d, blur_pool3d and vq_nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.problem_files import problems
from tests.ops import test_blur_pool3d, test_depth_to_space3d, test_vq_nearest

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal


@pytest.mark.parametrize("problem", problems("depth_to_space3d", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str
)
def test_depth_to_space(problem: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    test_depth_to_space3d.check_values_and_gradients(problem, dtype, device.type)


@pytest.mark.parametrize("problem", problems("blur_pool3d", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", test_blur_pool3d.DTYPES, ids=str)
def test_blur_pool(problem: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    test_blur_pool3d.check_values_and_gradients(problem, dtype, device.type)


@pytest.mark.parametrize("problem", problems("vq_nearest", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", test_vq_nearest.DTYPES, ids=str)
def test_nearest(problem: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    test_vq_nearest.check_nearest(problem, dtype, device.type)


def test_nearest_of_close_codes(device: torch.device) -> None:
    test_vq_nearest.check_close_codes(device.type)
    equal = torch.randn(1, 7, device=device).expand(90, 7)
    found = mf.vq_nearest(torch.randn(15, 7, device=device), equal, impl="native")
    assert_equal(found, torch.zeros_like(found))
