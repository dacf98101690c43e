"""factorized_embedding, forward and forward + backward, against plain PyTorch.

torch: an F.embedding a sub-token, added; torch_bag: all sub-tokens in one F.embedding_bag over one table, each
with the offset of its own. Both put the mask's row in by a where.
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


def _torch(ids: Tensor, weight: Tensor, mask: Tensor, vector: Tensor) -> Tensor:
    groups, values, _ = weight.shape
    bits = values.bit_length() - 1
    out = F.embedding(ids & (values - 1), weight[0])
    for g in range(1, groups):
        out = out + F.embedding((ids >> (g * bits)) & (values - 1), weight[g])
    return torch.where(mask.unsqueeze(-1), vector, out)


def _torch_bag(ids: Tensor, weight: Tensor, mask: Tensor, vector: Tensor) -> Tensor:
    groups, values, dim = weight.shape
    places = torch.arange(groups)
    rows = (
        (ids.unsqueeze(-1) >> (values.bit_length() - 1) * places) & (values - 1)
    ) + values * places
    out = F.embedding_bag(rows.view(-1, groups), weight.view(-1, dim), mode="sum")
    return torch.where(mask.unsqueeze(-1), vector, out.view(*ids.shape, dim))


@pytest.mark.parametrize("impl", ["native", "torch", "torch_bag"])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
@pytest.mark.parametrize(
    "problem", problems("factorized_embedding", "bench"), ids=lambda p: p["name"]
)
def test_factorized_embedding(
    benchmark: Any, problem: dict[str, Any], work: str, impl: str
) -> None:
    groups, values, dim = problem["weight"]
    ids = torch.randint(0, values**groups, problem["ids"])
    mask = torch.rand(problem["ids"]) < problem["masked"]
    leaves = [torch.randn(groups, values, dim), torch.randn(dim)]
    upstream = torch.randn(*ids.shape, dim)
    if work != "forward":
        leaves = [x.requires_grad_() for x in leaves]

    def forward() -> Tensor:
        weight, vector = leaves
        if impl == "native":
            return mf.factorized_embedding(
                ids, weight, mask=mask, mask_embedding=vector, impl="native"
            )
        return (_torch_bag if impl == "torch_bag" else _torch)(ids, weight, mask, vector)

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, upstream)

    run: Callable[[], object] = forward if work == "forward" else both
    benchmark.group = f"factorized_embedding {problem['name']} float32 {work}"
    benchmark.extra_info["impl"] = impl
    if work != "forward" and "target" in problem:
        benchmark.extra_info["target"] = problem["target"]
    benchmark(run)
