from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.goldens import load_goldens

import magvit_fast as mf

GOLDEN = "magvit_v2/blur_pool"
CASES = (
    "k3_even", "k3_odd", "k3_t1", "k3_1x1x1", "k3_2x2x2", "k4_even", "k4_odd", "k5_odd", "k2_even",
)  # fmt: skip


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values_and_gradients_are_exact(case: str, dtype: torch.dtype) -> None:
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
    with pytest.raises(NotImplementedError, match="blur_pool3d"):
        mf.blur_pool3d(x, impl="native")


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
