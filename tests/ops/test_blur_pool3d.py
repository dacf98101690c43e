"""blur_pool3d: goldens, budgets at every instruction set, the transpose, doors."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from tests.goldens import load_goldens

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_within_budget

GOLDEN = "magvit_v2/blur_pool"
CASES = (
    "k3_even", "k3_odd", "k3_t1", "k3_1x1x1", "k3_2x2x2", "k4_even", "k4_odd", "k5_odd", "k2_even",
)  # fmt: skip


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_values_and_gradients(problem: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Value, gradient and the gradient of that, against float64, within plain torch's error."""
    layout = torch.contiguous_format if problem.get("contiguous") else torch.channels_last_3d
    x = torch.randn(problem["size"], device=device).to(dtype).contiguous(memory_format=layout)
    options = {
        "stride": tuple(problem.get("stride", (2, 2, 2))),
        "filter_size": problem.get("filter_size", 3),
    }
    found = []
    for impl, source in (("native", x), ("reference", x), ("reference", x.double())):
        leaf = source.detach().requires_grad_()
        y = mf.blur_pool3d(leaf, impl=impl, **options)
        generator = torch.Generator(device).manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, device=device).to(y.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        (ddy,) = torch.autograd.grad(dx, dy, source)
        found.append((y, dx, ddy))
    for name, *values in zip(("y", "dx", "ddy"), *found, strict=True):
        assert_within_budget(*values, name=name)
    assert found[0][0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("problem", problems("blur_pool3d", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(problem: dict[str, Any], dtype: torch.dtype, isa_level: str) -> None:
    check_values_and_gradients(problem, dtype, "cpu")


@given(
    size=st.tuples(*[st.integers(1, 6)] * 3),
    stride=st.tuples(*[st.integers(1, 4)] * 3),
    taps=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_are_transposes(
    size: tuple[int, int, int], stride: tuple[int, int, int], taps: int, seed: int
) -> None:
    """<blur(x), dy> = <x, dx> on numbers whose sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 8, (1, 2, *size), generator=generator).float().requires_grad_()
    y = mf.blur_pool3d(x, stride, filter_size=taps, impl="native")
    assert torch.equal(y, mf.blur_pool3d(x, stride, filter_size=taps, impl="reference"))
    dy = torch.randint(-8, 8, y.shape, generator=generator).float()
    (dx,) = torch.autograd.grad(y, x, dy)
    along_y = (y.detach().double() * dy).sum()
    assert float(along_y) == float((x.detach().double() * dx).sum())


def test_threads_change_nothing() -> None:
    x = torch.randn(1, 32, 5, 20, 16)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(mf.blur_pool3d(x, impl="native"))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_opcheck() -> None:
    x = torch.randn(1, 3, 3, 4, 5)
    for value in (x, x.contiguous(memory_format=torch.channels_last_3d), x[:0]):
        torch.library.opcheck(torch.ops.magvit_fast.blur_pool3d.default, (value, [2, 2, 2], 3))
        torch.library.opcheck(
            torch.ops.magvit_fast.blur_pool3d_backward.default,
            (value, [value.shape[0], 3, 6, 7, 10], [2, 2, 2], 3),
        )


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values_and_gradients_are_exact(
    case: str, dtype: torch.dtype, isa_level: str
) -> None:
    golden = load_goldens(GOLDEN)
    x, y, dy, dx = (channels_first(golden[f"{case}/{k}"]).to(dtype) for k in ("x", "y", "dy", "dx"))
    size = int(golden[f"{case}/filter_size"])
    x.requires_grad_()
    out = mf.blur_pool3d(x, filter_size=size)
    assert torch.equal(out, y)
    assert torch.equal(torch.autograd.grad(out, x, dy)[0], dx)
    ones = mf.blur_pool3d(torch.ones_like(x), filter_size=size)
    assert torch.equal(ones, channels_first(golden[f"{case}/y_of_ones"]).to(dtype))


def test_every_golden_case_is_tested() -> None:
    assert {name.split("/")[0] for name in load_goldens(GOLDEN)} == set(CASES)


def test_gradients_of_both_orders() -> None:
    x = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mf.blur_pool3d, x)
    assert torch.autograd.gradgradcheck(lambda v: mf.blur_pool3d(v).square(), x)


def test_strides_formats_and_empty_batches() -> None:
    x = torch.randn(2, 3, 5, 6, 7)
    expected = mf.blur_pool3d(x)
    strided = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(mf.blur_pool3d(strided), expected)
    assert mf.blur_pool3d(x, (1, 2, 2)).shape == (2, 3, 5, 3, 4)
    assert mf.blur_pool3d(x[:0]).shape == (0, 3, 3, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert mf.blur_pool3d(x).dtype == torch.bfloat16
    assert mf.blur_pool3d(x.bfloat16()).dtype == torch.bfloat16


def test_fullgraph_compile() -> None:
    x = torch.randn(1, 3, 5, 6, 7)
    compiled = torch.compile(mf.blur_pool3d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mf.blur_pool3d(x))


def test_bad_input() -> None:
    x = torch.randn(1, 3, 5, 6, 7)
    with pytest.raises(ValueError, match="x: expected 5 dimensions"):
        mf.blur_pool3d(x[0])
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        mf.blur_pool3d(x.int())
    with pytest.raises(ValueError, match="stride: expected"):
        mf.blur_pool3d(x, 0)
    with pytest.raises(ValueError, match="filter_size: expected 1 or more"):
        mf.blur_pool3d(x, filter_size=0)
    with pytest.raises(ValueError, match="x: expected at least one channel, frame, row and column"):
        mf.blur_pool3d(x[:, :, :0])
    with pytest.raises(NotImplementedError, match=r"blur_pool3d.*filter_size 9"):
        mf.blur_pool3d(x, filter_size=9, impl="native")
    with pytest.raises(NotImplementedError, match=r"blur_pool3d.*float64"):
        mf.blur_pool3d(x.double(), impl="native")


@pytest.mark.cuda
def test_cuda_equals_the_cpu_and_captures() -> None:
    x = torch.randint(-64, 64, (2, 8, 5, 9, 8)).float() / 64  # exact in every order of summation
    on_gpu = x.cuda()
    assert torch.equal(mf.blur_pool3d(on_gpu).cpu(), mf.blur_pool3d(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mf.blur_pool3d(on_gpu)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mf.blur_pool3d(on_gpu)
    on_gpu.neg_()
    graph.replay()
    assert torch.equal(out.cpu(), -mf.blur_pool3d(x))
