"""depth_to_space3d against plain PyTorch: reshape, permute, reshape, in both memory formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench

LAYOUTS = {"torch_contiguous": torch.contiguous_format}
LAYOUTS |= {"torch_channels_last": torch.channels_last_3d, "native": torch.channels_last_3d}


@pytest.mark.parametrize("impl", list(LAYOUTS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("problem", problems("depth_to_space3d", "bench"), ids=lambda p: p["name"])
def test_depth_to_space3d(
    benchmark: Any, problem: dict[str, Any], backward: bool, impl: str
) -> None:
    x = torch.randn(problem["size"]).contiguous(memory_format=LAYOUTS[impl])
    x.requires_grad_(backward)
    factor, drop = tuple(problem["factor"]), problem["drop_first"]
    which = "native" if impl == "native" else "reference"

    def call() -> Tensor:
        return mf.depth_to_space3d(x, factor, drop_first=drop, impl=which)

    dy = torch.randn(call().shape).contiguous(memory_format=LAYOUTS[impl])
    run: Callable[[], object] = (lambda: torch.autograd.grad(call(), x, dy)) if backward else call
    what = "forward_backward" if backward else "forward"
    benchmark.group = f"depth_to_space3d {problem['name']} float32 {what}"
    benchmark.extra_info["impl"] = impl
    benchmark(run)
