"""lfq_quantize against plain PyTorch: sign by where, bits by a weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench


def _torch(z: Tensor) -> tuple[Tensor, Tensor]:
    positive = z > 0
    quantized = torch.where(positive, 1.0, -1.0)
    powers = (2 ** torch.arange(z.shape[1])).view(1, -1, 1, 1, 1)
    return quantized, (positive * powers).sum(1)


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("problem", problems("lfq_quantize", "bench"), ids=lambda p: p["name"])
def test_lfq_quantize(benchmark: Any, problem: dict[str, Any], impl: str) -> None:
    z = torch.randn(problem["size"])
    if problem.get("channels_last"):
        z = z.contiguous(memory_format=torch.channels_last_3d)
    run: Callable[[], object] = (
        (lambda: mf.lfq_quantize(z, impl="native")) if impl == "native" else (lambda: _torch(z))
    )
    benchmark.group = f"lfq_quantize {problem['name']} float32"
    benchmark.extra_info["impl"] = impl
    with torch.no_grad():
        benchmark(run)
