"""lfq_codes: indices back to -1 / +1, every layout, dtype and instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.problem_files import problems
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("problem", problems("lfq_codes", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bit_order", ["lsb", "msb"])
def test_native_equals_reference(
    problem: dict[str, Any], dtype: torch.dtype, bit_order: str, isa_level: str
) -> None:
    bits = problem["bits"]
    indices = torch.randint(0, 2**bits - 1, problem["size"])
    options: dict[str, Any] = {"bit_order": bit_order, "dtype": dtype}
    options["channel_dim"] = problem.get("channel_dim", 1)
    codes = mf.lfq_codes(indices, bits, impl="native", **options)
    assert_equal(codes, mf.lfq_codes(indices, bits, impl="reference", **options))
    options.pop("dtype")
    assert_equal(mf.lfq_quantize(codes, **options)[1], indices)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1])
def test_any_axis_and_any_strides(impl: str, channel_dim: int) -> None:
    indices = torch.randint(0, 2**9, (6, 10))
    for part in (indices, indices.T, indices[::2, 1::3], indices[:, :1].expand(6, 4)):
        codes = mf.lfq_codes(part, 9, channel_dim=channel_dim, impl=impl)
        expected = torch.stack([(part >> c & 1) * 2.0 - 1.0 for c in range(9)], channel_dim)
        assert_equal(codes, expected)


def test_zero_size_and_float64() -> None:
    assert mf.lfq_codes(torch.empty(0, 5, 4, dtype=torch.int64), 18).shape == (0, 18, 5, 4)
    one = mf.lfq_codes(torch.tensor([5]), 3, dtype=torch.float64)
    assert one.tolist() == [[1.0, -1.0, 1.0]]
    with pytest.raises(NotImplementedError, match="float64"):
        mf.lfq_codes(torch.tensor([5]), 3, dtype=torch.float64, impl="native")


def test_opcheck() -> None:
    op = torch.ops.magvit_fast.lfq_codes.default
    indices = torch.randint(0, 32, (3, 4))
    for x in (indices, indices.T, indices[:0]):
        torch.library.opcheck(op, (x, 5, 1, False, torch.bfloat16))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compiles_whole(impl: str) -> None:
    def f(indices: Tensor) -> Tensor:
        return mf.lfq_codes(indices + 1, 6, impl=impl)

    indices = torch.randint(0, 63, (2, 3, 2))
    with torch.inference_mode():
        expected = f(indices)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(indices), expected)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("bad", [-1, 8, 2**62, -(2**63)])
def test_index_out_of_range_is_named(impl: str, bad: int, isa_level: str) -> None:
    indices = torch.zeros(40, 50, dtype=torch.int64)
    indices[3, 17] = indices[20, 1] = bad
    with pytest.raises(ValueError, match=rf"\[0, 2\*\*3\), got {bad} at \(3, 17\)"):
        mf.lfq_codes(indices, 3, impl=impl)


def test_bad_input() -> None:
    indices = torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"indices: expected dtype torch.int64, got torch.int32"):
        mf.lfq_codes(indices.int(), 3)
    with pytest.raises(ValueError, match=r"num_bits: expected 1 to 63, got 64"):
        mf.lfq_codes(indices, 64)
    with pytest.raises(ValueError, match=r"channel_dim: 2 is out of range"):
        mf.lfq_codes(indices, 3, channel_dim=2)
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch.int8"):
        mf.lfq_codes(indices, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"bit_order: expected one of"):
        mf.lfq_codes(indices, 3, bit_order="middle")
