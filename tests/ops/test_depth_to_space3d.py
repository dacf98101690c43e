"""depth_to_space3d: the permutation and its inverse, every layout, dtype and instruction set."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def _numbered(size: list[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    x = torch.arange(torch.Size(size).numel(), device=device).view(size)
    return x.to(dtype)


def check_values_and_gradients(problem: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    factor, drop = tuple(problem["factor"]), problem["drop_first"]
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = _numbered(problem["size"], dtype, device).contiguous(memory_format=layout)
        y = mf.depth_to_space3d(x, factor, drop_first=drop, impl="native")
        assert_equal(y, mf.depth_to_space3d(x, factor, drop_first=drop, impl="reference"))
        assert y.is_contiguous(memory_format=layout)
        if not dtype.is_floating_point:
            continue
        x.requires_grad_()
        y = mf.depth_to_space3d(x, factor, drop_first=drop, impl="native")
        dy = _numbered(list(y.shape), dtype, device) + 1
        (dx,) = torch.autograd.grad(y, x, dy)
        plain = mf.depth_to_space3d(x, factor, drop_first=drop, impl="reference")
        assert_equal(dx, torch.autograd.grad(plain, x, dy)[0])


@pytest.mark.parametrize("problem", problems("depth_to_space3d", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(problem: dict[str, Any], dtype: torch.dtype, isa_level: str) -> None:
    check_values_and_gradients(problem, dtype, "cpu")


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_by_definition(impl: str) -> None:
    (st_, sh, sw), c, drop = (2, 3, 2), 3, 1
    x = torch.randn(2, st_ * sh * sw * c, 2, 2, 3)
    y = mf.depth_to_space3d(x, (st_, sh, sw), drop_first=drop, impl=impl)
    assert y.shape == (2, c, 2 * st_ - drop, 2 * sh, 3 * sw)
    for t, h, w in ((0, 5, 5), (2, 0, 3), (1, 3, 0)):
        i, j, k = (t + drop) % st_, h % sh, w % sw
        channels = [((i * sh + j) * sw + k) * c + n for n in range(c)]
        expected = x[:, channels, (t + drop) // st_, h // sh, w // sw]
        assert_equal(y[:, :, t, h, w], expected)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_the_result_is_dense_in_the_memory_format_of_x(
    impl: str, layout: torch.memory_format
) -> None:
    x = torch.randn(2, 24, 3, 2, 3).contiguous(memory_format=layout)
    y = mf.depth_to_space3d(x, 2, drop_first=1, impl=impl)
    assert y.is_contiguous(memory_format=layout)
    assert y.untyped_storage().nbytes() == y.nbytes  # nothing dropped is kept alive
    cut = mf.depth_to_space3d(x[:, :, 1:], 2, impl=impl)
    assert cut.is_contiguous(memory_format=layout)


@given(
    factor=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 20),
    frames=st.integers(1, 3),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_keeps_every_value(
    factor: tuple[int, int, int], channels: int, frames: int, last: bool, seed: int
) -> None:
    deep = channels * factor[0] * factor[1] * factor[2]
    x = torch.randn(2, deep, frames, 2, 3, generator=torch.Generator().manual_seed(seed))
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    y = mf.depth_to_space3d(x, factor, impl="native")
    assert_equal(y.flatten().sort().values, x.flatten().sort().values)
    (back,) = torch.autograd.grad(y, x, y.detach())
    assert_equal(back, x)


def test_strides_of_any_kind() -> None:
    whole = torch.randn(2, 24, 4, 6, 10)
    for x in (whole[:, :, 1:], whole[..., ::2], whole.permute(0, 1, 4, 3, 2), whole[:, 8:16]):
        expected = mf.depth_to_space3d(x, 2, impl="reference")
        assert_equal(mf.depth_to_space3d(x, 2, impl="native"), expected)
    cut = whole.contiguous(memory_format=torch.channels_last_3d)[:, :, 1:]
    y = mf.depth_to_space3d(cut, 2, impl="native")
    assert_equal(y, mf.depth_to_space3d(cut, 2, impl="reference"))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_second_derivatives() -> None:
    x = torch.randn(1, 8, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return mf.depth_to_space3d(x, 2, drop_first=1, impl="native").square()

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_zero_size() -> None:
    x = torch.empty(0, 8, 2, 3, 3, requires_grad=True)
    y = mf.depth_to_space3d(x, 2, impl="native")
    assert y.shape == (0, 1, 4, 6, 6)
    y.sum().backward()
    assert mf.depth_to_space3d(torch.randn(1, 8, 1, 2, 2), 2, drop_first=2).numel() == 0


def test_opcheck() -> None:
    x = torch.randn(1, 16, 2, 2, 3)
    for value in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        torch.library.opcheck(torch.ops.magvit_fast.depth_to_space3d.default, (value, [2, 2, 2], 1))
        torch.library.opcheck(
            torch.ops.magvit_fast.depth_to_space3d_backward.default, (value, [1, 2, 3], 1)
        )


def test_compiled_gradient() -> None:
    def f(x: Tensor) -> Tensor:
        return mf.depth_to_space3d(x, (2, 2, 2), drop_first=1).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 16, 2, 2, 3).contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    (actual,) = torch.autograd.grad(compiled(x).sum(), x)
    assert_equal(actual, torch.autograd.grad(f(x).sum(), x)[0])


def test_complex_numbers_go_through_the_reference() -> None:
    x = torch.zeros(1, 8, 1, 1, 1, dtype=torch.complex128)
    assert mf.depth_to_space3d(x, 2).dtype == torch.complex128
    with pytest.raises(NotImplementedError, match="complex128"):
        mf.depth_to_space3d(x, 2, impl="native")
