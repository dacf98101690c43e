"""What every op promises, checked alike for those of the models' layers: one definition, five ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from magvit_fast import ops
from magvit_fast.testing.budgets import assert_within_budget

CODEBOOK = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
SCALE = torch.randn(2, 8, 1, 4, 6, generator=torch.Generator().manual_seed(1))


def _norm(x: Tensor, **options: Any) -> Tensor:
    scale = SCALE[: x.shape[0]].to(x.dtype)
    return ops.group_norm_silu(x, 4, scale=scale, shift=-scale, **options)


def _clip_norm(x: Tensor, **options: Any) -> Tensor:
    return ops.group_norm_silu(x, 2, per_frame=False, activation=None, **options)


def _depth_to_space(x: Tensor, **options: Any) -> Tensor:
    return ops.depth_to_space3d(x, 2, drop_first=1, **options)


def _blur(x: Tensor, **options: Any) -> Tensor:
    return ops.blur_pool3d(x, (1, 2, 2), **options)


def _nearest(x: Tensor, **options: Any) -> Tensor:
    return ops.vq_nearest(x, CODEBOOK.to(x.dtype), **options)


OPS: list[Callable[..., Tensor]] = [_norm, _clip_norm, _depth_to_space, _blur, _nearest]
FLOATING = [op for op in OPS if op is not _nearest]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.lstrip("_"))
floating_ops = pytest.mark.parametrize("op", FLOATING, ids=lambda op: op.__name__.lstrip("_"))


def _x() -> Tensor:
    return torch.randn(2, 8, 3, 4, 6)


@every_op
def test_compiles_for_any_size_without_a_graph_break(op: Callable[..., Tensor]) -> None:
    """With its gradient, where it has one; of one size in each op's own test."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (_x(), _x()[:, :, :2]):
        found = []
        for run in (compiled, op):
            leaf = x.clone().requires_grad_(op in FLOATING)
            y = run(leaf)
            found.append(y)
            if y.requires_grad:
                found += torch.autograd.grad(y.square().sum(), leaf)
        assert len(found) == (4 if op in FLOATING else 2)
        torch.testing.assert_close(found[: len(found) // 2], found[len(found) // 2 :])


@every_op
def test_strides_of_any_kind(op: Callable[..., Tensor]) -> None:
    x = _x()
    expected = op(x)
    whole = torch.randn(2, 8, 3, 8, 12)
    whole[..., ::2, 1::2] = x
    for strided in (
        x.contiguous(memory_format=torch.channels_last_3d),
        x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
        whole[..., ::2, 1::2],
    ):
        torch.testing.assert_close(op(strided), expected)


@every_op
def test_an_empty_batch(op: Callable[..., Tensor]) -> None:
    x = _x()
    result = op(x[:0])
    assert result.shape == (0, *op(x).shape[1:])
    assert result.dtype == op(x).dtype


@floating_ops
def test_memory_format_of_the_result(op: Callable[..., Tensor]) -> None:
    last = op(_x().contiguous(memory_format=torch.channels_last_3d))
    assert last.is_contiguous(memory_format=torch.channels_last_3d) or last.stride(1) == 1
    assert op(_x()).stride(4) == 1


@floating_ops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = _x().to(dtype)
    result = op(x)
    assert result.dtype == dtype
    assert_within_budget(result, op(x, impl="reference"), op(x.double()))


@every_op
def test_inference_mode_and_autocast(op: Callable[..., Tensor]) -> None:
    x = _x()
    expected = op(x)
    with torch.inference_mode():
        assert torch.equal(op(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        result = op(x)
    torch.testing.assert_close(result.to(expected.dtype), expected, rtol=0.02, atol=0.02)


@every_op
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_a_default_device_elsewhere_changes_nothing(op: Callable[..., Tensor], impl: str) -> None:
    x = _x().requires_grad_(op is not _nearest)

    def results() -> list[Tensor]:
        y = op(x, impl=impl)
        return [y, *torch.autograd.grad(y.sum(), x)] if y.requires_grad else [y]

    with torch.device("meta"):
        elsewhere = results()
    for value, expected in zip(elsewhere, results(), strict=True):
        assert torch.equal(value, expected)


@floating_ops
def test_gradients_to_second_order(op: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 8, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, x, fast_mode=True)
