"""The CUDA kernels of factorized_embedding: values, gradients, and the gradient's fixed order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal, assert_within_budget


def _run(
    ids: Tensor, weight: Tensor, mask: Tensor | None, row: Tensor, grad: Tensor, impl: str
) -> tuple[Tensor, ...]:
    weight, row = weight.detach().requires_grad_(), row.detach().requires_grad_()
    out = mf.factorized_embedding(
        ids, weight, mask=mask, mask_embedding=None if mask is None else row, impl=impl
    )
    leaves = [weight] if mask is None else [weight, row]
    return (out, *torch.autograd.grad(out, leaves, grad.to(out.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("groups", "values", "dim", "positions"), [(2, 32, 264, 300), (1, 64, 7, 40), (3, 2, 16, 600)]
)
def test_values_and_gradients(
    groups: int, values: int, dim: int, positions: int, masked: bool, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    ids = torch.randint(values**groups, (2, positions // 2), device=device)
    weight = torch.randn(groups, values, dim).to(device, dtype)
    row = torch.randn(dim).to(device, dtype)
    mask = torch.rand(2, positions // 2, device=device) < 0.4 if masked else None
    grad = torch.randn(2, positions // 2, dim).to(device, dtype)
    actual = _run(ids, weight, mask, row, grad, "native")
    plain = _run(ids, weight, mask, row, grad, "reference")
    exact = _run(ids, weight.double(), mask, row.double(), grad.double(), "reference")
    for name, a, p, e in zip(("out", "dweight", "dmask"), actual, plain, exact, strict=False):
        assert_within_budget(a, p, e, name=name)
    again = _run(ids, weight, mask, row, grad, "native")
    for first, second in zip(actual, again, strict=True):
        assert_equal(first, second, name="the second run")


def test_every_position_in_one_row(device: torch.device) -> None:
    ids = torch.zeros(1, 1000, dtype=torch.int64, device=device)
    weight, row = torch.randn(1, 4, 8, device=device), torch.randn(8, device=device)
    grad = torch.ones(1, 1000, 8, device=device)
    _, of_weight = _run(ids, weight, None, row, grad, "native")
    assert_equal(of_weight[0, 0], torch.full((8,), 1000.0))
    assert not bool(of_weight[0, 1:].any())
