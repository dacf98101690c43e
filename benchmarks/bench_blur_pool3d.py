"""blur_pool3d against plain PyTorch in both memory formats: zero padding, then one depthwise convolution (torch_*), or
two average pools, for [1 2 1] / 4 is two times [1 1] / 2 (torch_pools_*).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench

LAYOUTS = {"native": torch.channels_last_3d}
for way in ("torch", "torch_pools"):
    LAYOUTS |= {f"{way}_contiguous": torch.contiguous_format}
    LAYOUTS |= {f"{way}_channels_last": torch.channels_last_3d}


def _pools(x: Tensor) -> Tensor:
    pads: list[int] = []
    for n in reversed(x.shape[2:]):  # "same" for three taps at stride 2, the smaller half first
        pads += [n % 2, 1]
    return F.avg_pool3d(F.avg_pool3d(F.pad(x, pads), 2, 1), 2, 2)


@pytest.mark.parametrize("impl", list(LAYOUTS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("problem", problems("blur_pool3d", "bench"), ids=lambda p: p["name"])
def test_blur_pool3d(benchmark: Any, problem: dict[str, Any], backward: bool, impl: str) -> None:
    x = torch.randn(problem["size"]).contiguous(memory_format=LAYOUTS[impl])
    x.requires_grad_(backward)
    which = "native" if impl == "native" else "reference"

    def call() -> Tensor:
        return _pools(x) if "pools" in impl else mf.blur_pool3d(x, impl=which)

    dy = torch.randn_like(call())
    run: Callable[[], object] = (lambda: torch.autograd.grad(call(), x, dy)) if backward else call
    what = "forward_backward" if backward else "forward"
    benchmark.group = f"blur_pool3d {problem['name']} float32 {what}"
    benchmark.extra_info["impl"] = impl
    benchmark(run)
