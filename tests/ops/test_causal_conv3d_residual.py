"""causal_conv3d with a residual: the sum in the convolution is the sum beside it, gradients too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.ops.conv_problems import fp32_precision
from torch import Tensor

from magvit_fast import ops
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (x, weight, options): one for each way through the kernels.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "winograd": ((2, 32, 5, 9, 10), (70, 32, 3, 3, 3), {"time_mode": "replicate"}),
    "direct": ((2, 6, 4, 5, 7), (20, 3, 3, 3, 3), {"groups": 2, "space_mode": "reflect"}),
    "strided": ((1, 24, 5, 8, 9), (33, 24, 3, 3, 3), {"stride": 2}),
    "narrow": ((2, 40, 3, 6, 7), (3, 40, 3, 3, 3), {}),
    "shortcut": ((2, 16, 3, 6, 7), (24, 16, 1, 1, 1), {}),
}


def _tensors(case: str, dtype: torch.dtype, history: int) -> tuple[list[Tensor], dict[str, Any]]:
    """x, weight, bias, residual (and history), already rounded to dtype."""
    torch.manual_seed(0)
    size, kernel, options = CASES[case]
    x, weight = torch.randn(size), torch.randn(kernel) / math.prod(kernel[1:]) ** 0.5
    y = ops.causal_conv3d(x, weight, impl="reference", **options)
    tensors = [x, weight, torch.randn(kernel[0]), torch.randn(y.shape)]
    if history:
        tensors.append(torch.randn(*size[:2], history, *size[3:]))
    return [t.to(dtype) for t in tensors], options


def _run(tensors: list[Tensor], options: dict[str, Any], impl: str) -> Tensor:
    x, weight, bias, residual, *history = tensors
    earlier = history[0] if history else None
    return ops.causal_conv3d(
        x, weight, bias, residual=residual, history=earlier, impl=impl, **options
    )


def _value_and_grads(tensors: list[Tensor], options: dict[str, Any], impl: str) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = _run(leaves, options, impl)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


@pytest.mark.parametrize("history", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, history, isa_level) -> None:
    tensors, options = _tensors(case, dtype, history)
    with fp32_precision("ieee"):
        ours = _value_and_grads(tensors, options, "native")
    plain = _value_and_grads(tensors, options, "reference")
    exact = _value_and_grads([t.double() for t in tensors], options, "reference")
    for got, like, right in zip(ours, plain, exact, strict=True):
        assert_within_budget(got, like, right)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_the_sum_beside_it_to_the_bit(case, isa_level) -> None:
    tensors, options = _tensors(case, torch.float32, 0)
    x, weight, bias, residual = tensors
    apart = ops.causal_conv3d(x, weight, bias, impl="native", **options) + residual
    assert_equal(_run(tensors, options, "native"), apart)


def test_the_input_itself_as_residual() -> None:
    x = torch.randn(1, 32, 5, 8, 8, requires_grad=True)
    weight = torch.randn(32, 32, 3, 3, 3) / 30
    before = x.detach().clone()
    y = ops.causal_conv3d(x, weight, residual=x, impl="native")
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    apart = x + ops.causal_conv3d(x, weight, impl="native")
    (expected,) = torch.autograd.grad(apart.square().sum(), x)
    assert_equal(y, apart)
    assert_equal(dx, expected)
    assert_equal(x, before)


def test_second_derivatives() -> None:
    options = {"time_mode": "replicate", "space_mode": "replicate"}
    tensors = [torch.randn(1, 2, 2, 3, 3), torch.randn(2, 2, 2, 3, 3), torch.randn(2),
               torch.randn(1, 2, 2, 3, 3), torch.randn(1, 2, 1, 3, 3)]  # fmt: skip
    exact = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: _run(list(t), options, "reference"), exact)
    assert torch.autograd.gradgradcheck(lambda *t: _run(list(t), options, "reference"), exact)

    def penalty(leaves: list[Tensor], impl: str) -> list[Tensor]:
        y = _run(leaves, options, impl)
        firsts = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().mean() for g in firsts), leaves))

    leaves = [t.requires_grad_() for t in tensors]
    for a, b in zip(penalty(leaves, "native"), penalty(exact, "reference"), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_layouts_empty_batches_and_inference() -> None:
    x, weight = torch.randn(2, 6, 3, 5, 5), torch.randn(8, 6, 3, 3, 3)
    residual = torch.randn(2, 8, 3, 5, 5)
    y = ops.causal_conv3d(x, weight, residual=residual, impl="native")
    last = residual.contiguous(memory_format=torch.channels_last_3d)
    flipped = residual.transpose(3, 4).contiguous().transpose(3, 4)
    for other in (last, flipped, residual.expand(2, -1, -1, -1, -1)):
        assert_equal(ops.causal_conv3d(x, weight, residual=other, impl="native"), y)
    assert y.is_contiguous()
    with torch.inference_mode():
        assert_equal(ops.causal_conv3d(x, weight, residual=residual, impl="native").clone(), y)
    empty = ops.causal_conv3d(x[:0], weight, residual=residual[:0], impl="native")
    assert empty.shape == (0, 8, 3, 5, 5)


def test_opcheck_and_compile() -> None:
    x, residual = torch.randn(2, 1, 4, 3, 5, 6).unbind()
    weight = torch.randn(4, 4, 3, 3, 3)
    geometry = [1, 1, 1], [1, 1, 1], 1, [2, 0, 1, 1, 1, 1], "zeros", "zeros"
    op = torch.ops.magvit_fast.causal_conv3d.default
    torch.library.opcheck(op, (x, None, weight, None, residual, *geometry))

    def step(x: Tensor, residual: Tensor) -> Tensor:
        return ops.causal_conv3d(x, weight, residual=residual).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = x.requires_grad_(), residual.requires_grad_()
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(step(*leaves), leaves), strict=True):
        assert_equal(a, b)


def test_autocast_takes_it_to_the_dtype_of_the_result() -> None:
    x, weight = torch.randn(1, 4, 3, 5, 5), torch.randn(4, 4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.causal_conv3d(x, weight, residual=x, impl="native")
    low = x.bfloat16()
    assert_equal(y, ops.causal_conv3d(low, weight.bfloat16(), residual=low, impl="native"))


@pytest.mark.parametrize(
    ("residual", "kind", "message"),
    [
        (torch.zeros(1, 4, 3, 5, 4), ValueError, "residual: expected the shape of the result"),
        (torch.zeros(4, 3, 5, 5), ValueError, "residual: expected 5 dimensions"),
        (torch.zeros(1, 4, 3, 5, 5).double(), TypeError, "residual: expected dtype"),
        (torch.zeros(1, 4, 3, 5, 5, device="meta"), ValueError, "residual: expected device"),
        ([1.0], TypeError, "residual: expected a Tensor"),
    ],
)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_bad_input_is_named(residual, kind, message, impl) -> None:
    x, weight = torch.zeros(1, 4, 3, 5, 5), torch.zeros(4, 4, 3, 3, 3)
    with pytest.raises(kind, match=message):
        ops.causal_conv3d(x, weight, residual=residual, impl=impl)
