"""The LFQ training step: quantize, both entropies, and the gradient of their difference.

Against our own reference in PyTorch (the same factorization, one matrix product) and against
vector-quantize-pytorch's LFQ with all codes (dense: seconds and 10 GB at 18 bits, so one round each).
The latter also returns quantized codes and adds a commitment loss, which is small beside the entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench


def _step(z: Tensor, impl: str) -> Callable[[], object]:
    def run() -> object:
        quantized, _ = mf.lfq_quantize(z, channel_dim=-1, impl=impl)
        sample, codebook = mf.lfq_entropy(z, channel_dim=-1, impl=impl)
        loss = sample - codebook + 0.0 * quantized.sum()
        return torch.autograd.grad(loss, z)

    return run


def _vector_quantize_pytorch(z: Tensor) -> Callable[[], object]:
    library = pytest.importorskip("vector_quantize_pytorch")
    bits = z.shape[-1]
    lfq = library.LFQ(
        dim=bits, codebook_size=2**bits, entropy_loss_weight=1.0, diversity_gamma=1.0
    ).train()

    def run() -> object:
        _, _, loss = lfq(z, inv_temperature=100.0)
        return torch.autograd.grad(loss, z)

    return run


@pytest.mark.parametrize("impl", ["native", "torch_factorized", "vector_quantize_pytorch"])
@pytest.mark.parametrize("problem", problems("lfq_entropy", "bench"), ids=lambda p: p["name"])
def test_lfq_step(benchmark: Any, problem: dict[str, Any], impl: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(1, problem["positions"], problem["bits"]) * problem["deviation"]
    z.requires_grad_()
    benchmark.group = f"lfq_step {problem['name']} float32"
    benchmark.extra_info["impl"] = impl
    if impl == "native" and "target" in problem:
        benchmark.extra_info["target"] = problem["target"]
        if find_spec("vector_quantize_pytorch"):
            benchmark.extra_info["target_against"] = "vector_quantize_pytorch"
    if impl == "vector_quantize_pytorch":
        benchmark.pedantic(_vector_quantize_pytorch(z), rounds=1, iterations=1)
    else:
        benchmark(_step(z, "native" if impl == "native" else "reference"))
