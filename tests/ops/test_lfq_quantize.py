"""lfq_quantize: signs and packed bits, every layout, dtype and instruction set."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from tests.goldens import load_goldens
from torch import Tensor

import magvit_fast as mf
from magvit_fast.ops._layout import block_of
from magvit_fast.testing.budgets import assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _input(problem: dict[str, Any], dtype: torch.dtype) -> Tensor:
    z = torch.randn(problem["size"]).to(dtype)
    z.flatten()[::7] = 0.0
    if problem.get("channels_last"):
        z = z.contiguous(memory_format=torch.channels_last_3d)
    return z


@pytest.mark.parametrize("problem", problems("lfq_quantize", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bit_order", ["lsb", "msb"])
def test_native_equals_reference(
    problem: dict[str, Any], dtype: torch.dtype, bit_order: str, isa_level: str
) -> None:
    z = _input(problem, dtype)
    quantized, indices = mf.lfq_quantize(z, bit_order=bit_order, impl="native")
    expected, expected_indices = mf.lfq_quantize(z, bit_order=bit_order, impl="reference")
    assert_equal(quantized, expected)
    assert_equal(indices, expected_indices)
    assert quantized.stride() == z.stride()


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_boundary_values(impl: str, isa_level: str) -> None:
    tiny = 1e-45  # the smallest subnormal counts as positive
    z = torch.tensor([[0.0, -0.0, tiny, -tiny, torch.inf, -torch.inf, torch.nan, 2.0]]).T
    z = z.expand(8, 40)  # long enough for every vector width
    quantized, indices = mf.lfq_quantize(z, channel_dim=0, impl=impl)
    bits = [0, 0, 1, 0, 1, 0, 0, 1]
    assert quantized[:, 0].tolist() == [2.0 * b - 1.0 for b in bits]
    assert indices.tolist() == [sum(b << c for c, b in enumerate(bits))] * 40
    _, rows = mf.lfq_quantize(z.T.contiguous(), channel_dim=-1, impl=impl)
    assert_equal(rows, indices)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_straight_through_gradient(impl: str) -> None:
    z = torch.randn(2, 5, 3, 2, 2, requires_grad=True)
    quantized, _ = mf.lfq_quantize(z, impl=impl)
    upstream = torch.randn_like(z)
    quantized.backward(upstream)
    assert z.grad is not None
    assert_equal(z.grad, upstream)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1])
def test_any_axis_and_any_strides(impl: str, channel_dim: int) -> None:
    whole = torch.randn(6, 10, 8, 7)
    for z in (whole, whole.permute(2, 0, 3, 1), whole[::2, 1::3], whole[:, :, :1].expand_as(whole)):
        quantized, indices = mf.lfq_quantize(z, channel_dim=channel_dim, impl=impl)
        bits = (z > 0).movedim(channel_dim, -1)
        powers = 2 ** torch.arange(bits.shape[-1])
        assert_equal(indices, (bits * powers).sum(-1))
        assert_equal(quantized, torch.where(z > 0, 1.0, -1.0))


def test_channels_at_the_end_run_along_the_positions() -> None:
    """With a single position an outer index, vectors of channels would be out of the kernel's reach."""
    z = torch.randn(2, 3, 18)
    assert block_of(z, 2) == (1, 18, 6, 0, 1, 18)
    assert block_of(z.transpose(0, 1), 2) is None
    assert block_of(z[:, 0].T.contiguous().T, 1) == (1, 18, 2, 0, 2, 1)


def test_zero_size() -> None:
    for impl in ("native", "reference"):
        quantized, indices = mf.lfq_quantize(torch.empty(0, 18, 5, 4, 4), impl=impl)
        assert quantized.shape == (0, 18, 5, 4, 4)
        assert indices.shape == (0, 5, 4, 4)
        assert indices.dtype == torch.int64
        assert mf.lfq_quantize(torch.empty(0, 5, 18), channel_dim=-1, impl=impl)[1].numel() == 0


def test_float64_goes_through_the_reference() -> None:
    z = torch.randn(2, 6, 4, dtype=torch.float64)
    assert mf.lfq_quantize(z)[0].dtype == torch.float64
    with pytest.raises(NotImplementedError, match="float64"):
        mf.lfq_quantize(z, impl="native")


def test_golden_ids_of_the_port() -> None:
    """Google's port differs at exact zeros only (it gives +1 there)."""
    arrays = load_goldens("magvit_v2/token_ids")
    z = torch.from_numpy(arrays["d18_g1/z"])
    ids = torch.from_numpy(arrays["d18_g1/ids"].astype("int64"))
    _, indices = mf.lfq_quantize(z, channel_dim=-1)
    no_zero = (z != 0).all(-1)
    assert int(no_zero.sum()) > 10
    assert_equal(indices[no_zero], ids[no_zero])


@given(
    bits=st.integers(1, 63),
    positions=st.integers(0, 40),
    seed=st.integers(0, 999),
    msb=st.booleans(),
)
def test_codes_undo_quantize(bits: int, positions: int, seed: int, msb: bool) -> None:
    z = torch.randn(positions, bits, generator=torch.Generator().manual_seed(seed))
    order = "msb" if msb else "lsb"
    quantized, indices = mf.lfq_quantize(z, channel_dim=-1, bit_order=order, impl="native")
    assert_equal(mf.lfq_codes(indices, bits, channel_dim=-1, bit_order=order), quantized)
    again, same = mf.lfq_quantize(quantized, channel_dim=-1, bit_order=order)
    assert_equal(again, quantized)
    assert_equal(same, indices)


def test_opcheck() -> None:
    op = torch.ops.magvit_fast.lfq_quantize.default
    last = torch.randn(2, 5, 3, 2, 4).contiguous(memory_format=torch.channels_last_3d)
    inputs = (
        torch.randn(2, 5, 3),
        torch.randn(3, 2, 5).permute(1, 2, 0),
        torch.empty(0, 5, 3),
        torch.randn(2, 5, 3, 4).transpose(2, 3),  # dense, but its positions are no one stride apart
        last[:, :, 1:],  # not dense
    )
    for z in inputs:
        torch.library.opcheck(op, (z, 1, False))
        assert op(z, 1, False)[0].stride() == torch.empty_like(z).stride()
        assert_equal(op(z, 1, False)[1], mf.lfq_quantize(z, impl="reference")[1])


def test_compiles_whole() -> None:
    def f(z: Tensor) -> tuple[Tensor, Tensor]:
        quantized, indices = mf.lfq_quantize(z)
        return quantized * 2, indices

    z = torch.randn(2, 5, 3, 2, 2, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    quantized, indices = compiled(z)
    assert_equal(quantized, f(z)[0])
    assert_equal(indices, f(z)[1])
    quantized.sum().backward()
    assert z.grad is not None
    assert_equal(z.grad, torch.full_like(z, 2.0))


def test_inference_mode_and_autocast() -> None:
    z = torch.randn(2, 5, 3)
    expected = mf.lfq_quantize(z)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        quantized, indices = mf.lfq_quantize(z)
    assert_equal(quantized, expected[0])
    assert_equal(indices, expected[1])


def test_bad_input() -> None:
    z = torch.randn(2, 5, 3)
    with pytest.raises(TypeError, match=r"z: expected a floating-point dtype, got torch.int64"):
        mf.lfq_quantize(z.long())
    with pytest.raises(TypeError, match=r"z: expected a Tensor, got list"):
        mf.lfq_quantize([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channel_dim: 3 is out of range"):
        mf.lfq_quantize(z, channel_dim=3)
    with pytest.raises(ValueError, match=r"bit_order: expected one of 'lsb', 'msb', got 'big'"):
        mf.lfq_quantize(z, bit_order="big")
    with pytest.raises(ValueError, match=r"z: expected 1 to 63 channels at dim 1, got 64"):
        mf.lfq_quantize(torch.randn(2, 64))
