"""blur_pool3d against plain PyTorch: zero padding and one depthwise convolution, in both memory formats."""

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
@pytest.mark.parametrize("problem", problems("blur_pool3d", "bench"), ids=lambda p: p["name"])
def test_blur_pool3d(benchmark: Any, problem: dict[str, Any], backward: bool, impl: str) -> None:
    x = torch.randn(problem["size"]).contiguous(memory_format=LAYOUTS[impl])
    x.requires_grad_(backward)
    which = "native" if impl == "native" else "reference"

    def call() -> Tensor:
        return mf.blur_pool3d(x, impl=which)

    dy = torch.randn_like(call())
    run: Callable[[], object] = (lambda: torch.autograd.grad(call(), x, dy)) if backward else call
    what = "forward_backward" if backward else "forward"
    benchmark.group = f"blur_pool3d {problem['name']} float32 {what}"
    benchmark.extra_info["impl"] = impl
    benchmark(run)
