"""vq_nearest against plain PyTorch: the matrix product of addmm and argmin over whole rows, and torch.cdist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench


def _addmm(z: Tensor, codebook: Tensor) -> Tensor:
    flat = z.movedim(1, -1).reshape(-1, z.shape[1])
    return torch.addmm(codebook.square().sum(1), flat, codebook.T, alpha=-2).argmin(1)


def _cdist(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z.movedim(1, -1).reshape(-1, z.shape[1]), codebook).argmin(1)


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "native": lambda z, codebook: mf.vq_nearest(z, codebook, impl="native"),
    "torch_addmm": _addmm,
    "torch_cdist": _cdist,
}


@pytest.mark.parametrize("impl", list(CALLS))
@pytest.mark.parametrize("problem", problems("vq_nearest", "bench"), ids=lambda p: p["name"])
def test_vq_nearest(benchmark: Any, problem: dict[str, Any], impl: str) -> None:
    z = torch.randn(problem["size"]).contiguous(memory_format=torch.channels_last_3d)
    codebook = torch.randn(problem["codes"], problem["size"][1])
    benchmark.group = f"vq_nearest {problem['name']} float32"
    benchmark.extra_info["impl"] = impl
    benchmark(lambda: CALLS[impl](z, codebook))
