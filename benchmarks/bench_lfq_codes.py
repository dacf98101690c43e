"""lfq_codes against plain PyTorch: shift, mask, scale, convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench


def _torch(indices: Tensor, bits: int, channel_dim: int) -> Tensor:
    axis = channel_dim % (indices.dim() + 1)
    shifts = torch.arange(bits).view([-1] + [1] * (indices.dim() - axis))
    return torch.where(((indices.unsqueeze(axis) >> shifts) & 1).bool(), 1.0, -1.0)


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("problem", problems("lfq_codes", "bench"), ids=lambda p: p["name"])
def test_lfq_codes(benchmark: Any, problem: dict[str, Any], impl: str) -> None:
    bits, axis = problem["bits"], problem.get("channel_dim", 1)
    indices = torch.randint(0, 2**bits, problem["size"])
    run: Callable[[], object] = (
        (lambda: mf.lfq_codes(indices, bits, channel_dim=axis, impl="native"))
        if impl == "native"
        else (lambda: _torch(indices, bits, axis))
    )
    benchmark.group = f"lfq_codes {problem['name']} float32"
    benchmark.extra_info["impl"] = impl
    benchmark(run)
