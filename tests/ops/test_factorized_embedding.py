"""factorized_embedding: rows, masks and deterministic gradients."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _inputs(problem: dict[str, Any]) -> dict[str, Any]:
    groups, values, dim = problem["weight"]
    inputs: dict[str, Any] = {
        "ids": torch.randint(0, values**groups, problem["ids"]),
        "weight": torch.randn(groups, values, dim),
    }
    if problem["masked"]:
        inputs["mask"] = torch.rand(problem["ids"]) < problem["masked"]
        inputs["mask_embedding"] = torch.randn(dim)
    return inputs


def _with_gradients(
    inputs: dict[str, Any], grad: Tensor, dtype: torch.dtype, impl: str
) -> dict[str, Tensor]:
    leaves = {
        k: v.to(dtype).clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()
    }
    out = mf.factorized_embedding(**{**inputs, **leaves}, impl=impl)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize(
    "problem", problems("factorized_embedding", "test"), ids=lambda p: p["name"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_keeps_the_budget(
    problem: dict[str, Any], dtype: torch.dtype, isa_level: str
) -> None:
    inputs = _inputs(problem)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    grad = torch.randn(*problem["ids"], problem["weight"][2]).to(dtype)
    native = _with_gradients(inputs, grad, dtype, "native")
    plain = _with_gradients(inputs, grad, dtype, "reference")
    exact = _with_gradients(inputs, grad.double(), torch.float64, "reference")
    for name, value in native.items():
        assert_within_budget(value, plain[name], exact[name], name=name)


def test_many_masked_positions_keep_the_budget() -> None:
    inputs = {
        "ids": torch.zeros(20000, dtype=torch.int64), "weight": torch.randn(1, 2, 8),
        "mask": torch.ones(20000, dtype=torch.bool), "mask_embedding": torch.randn(8),
    }  # fmt: skip
    grad = torch.rand(20000, 8)
    native = _with_gradients(inputs, grad, torch.float32, "native")
    plain = _with_gradients(inputs, grad, torch.float32, "reference")
    exact = _with_gradients(inputs, grad.double(), torch.float64, "reference")
    name = "mask_embedding"
    assert_within_budget(native[name], plain[name], exact[name], name=name)
    assert_equal(native["weight"], torch.zeros(1, 2, 8))


def test_same_bits_for_any_number_of_threads() -> None:
    inputs = _inputs({"ids": [3000], "weight": [2, 8, 100], "masked": 0.3})
    grad = torch.randn(3000, 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_with_gradients(inputs, grad, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in other.items():
            assert_equal(value, results[0][name], name=name)


@given(
    groups=st.integers(1, 8),
    bits=st.integers(0, 4),
    count=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_ids_are_packed_by_group(groups: int, bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(0, 2**bits, (count, groups), generator=generator)
    ids = (parts << (bits * torch.arange(groups))).sum(-1)
    # Rows that say which they are: column g of sub-table g holds the row's number.
    weight = torch.zeros(groups, 2**bits, groups)
    for g in range(groups):
        weight[g, :, g] = torch.arange(2**bits)
    for impl in ("native", "reference"):
        assert_equal(mf.factorized_embedding(ids, weight, impl=impl), parts.float())


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_any_strides(impl: str) -> None:
    ids = torch.randint(0, 16, (6, 8))
    weight = torch.randn(5, 4, 2).permute(2, 1, 0)
    mask = torch.rand(8, 6).T < 0.5
    vector = torch.randn(10)[::2]
    for s in (slice(None), slice(1, None, 2)):
        out = mf.factorized_embedding(
            ids[:, s], weight, mask=mask[:, s], mask_embedding=vector, impl=impl
        )
        rows = weight[0, ids[:, s] & 3] + weight[1, ids[:, s] >> 2]
        assert_equal(out, torch.where(mask[:, s].unsqueeze(-1), vector, rows))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_zero_size(impl: str) -> None:
    weight = torch.randn(2, 4, 3, requires_grad=True)
    out = mf.factorized_embedding(torch.empty(0, 7, dtype=torch.int64), weight, impl=impl)
    assert out.shape == (0, 7, 3)
    out.sum().backward()
    assert weight.grad is not None
    assert_equal(weight.grad, torch.zeros(2, 4, 3))


def test_gradcheck_of_the_reference() -> None:
    ids, mask = torch.randint(0, 16, (5,)), torch.tensor([True, False, True, False, False])
    weight = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, m: mf.factorized_embedding(ids, w, mask=mask, mask_embedding=m), (weight, vector)
    )


def test_opcheck() -> None:
    ops = torch.ops.magvit_fast
    ids, weight = torch.randint(0, 16, (3, 5)), torch.randn(2, 4, 6)
    mask, vector = torch.rand(3, 5) < 0.5, torch.randn(6)
    torch.library.opcheck(ops.factorized_embedding.default, (ids, weight, None, None))
    torch.library.opcheck(ops.factorized_embedding.default, (ids, weight, mask, vector))
    for m in (None, mask):
        grad = torch.randn(3, 5, 6)
        torch.library.opcheck(ops.factorized_embedding_backward.default, (ids, m, grad, 2, 2))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compiles_whole(impl: str) -> None:
    ids, mask = torch.randint(0, 16, (3, 5)), torch.rand(3, 5) < 0.5

    def f(weight: Tensor, vector: Tensor) -> Tensor:
        out = mf.factorized_embedding(ids, weight, mask=mask, mask_embedding=vector, impl=impl)
        return (out * out).sum()

    leaves = [torch.randn(2, 4, 6, requires_grad=True), torch.randn(6, requires_grad=True)]
    expected = torch.autograd.grad(f(*leaves), leaves)
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    for a, e in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_inference_mode_autocast_and_float64() -> None:
    ids, weight = torch.randint(0, 16, (3, 5)), torch.randn(2, 4, 6)
    expected = mf.factorized_embedding(ids, weight)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_equal(mf.factorized_embedding(ids, weight), expected)
    assert mf.factorized_embedding(ids, weight.double()).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="float64"):
        mf.factorized_embedding(ids, weight.double(), impl="native")


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("bad", [-1, 16, 2**62])
def test_id_out_of_range_is_named(impl: str, bad: int, isa_level: str) -> None:
    weight, vector = torch.randn(2, 4, 600), torch.randn(600)
    ids = torch.zeros(20, 30, dtype=torch.int64)
    ids[3, 17] = ids[4, 1] = ids[15, 2] = bad
    mask = torch.zeros(20, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"\[0, 16\), got {bad} at \(3, 17\)"):
        mf.factorized_embedding(ids, weight, impl=impl)
    mask[3, 17] = True  # the id of a masked position is not looked at
    with pytest.raises(ValueError, match=rf"got {bad} at \(4, 1\)"):
        mf.factorized_embedding(ids, weight, mask=mask, mask_embedding=vector, impl=impl)


def test_bad_input() -> None:
    ids, weight = torch.zeros(3, 5, dtype=torch.int64), torch.randn(2, 4, 6)
    mask, vector = torch.zeros(3, 5, dtype=torch.bool), torch.randn(6)
    with pytest.raises(TypeError, match=r"ids: expected dtype torch.int64, got torch.int32"):
        mf.factorized_embedding(ids.int(), weight)
    with pytest.raises(ValueError, match=r"weight: expected 3 dimensions"):
        mf.factorized_embedding(ids, weight[0])
    with pytest.raises(ValueError, match=r"weight: expected a power of two"):
        mf.factorized_embedding(ids, weight[:, :3])
    with pytest.raises(ValueError, match=r"weight: expected 1 to 8 sub-tables, got 9"):
        mf.factorized_embedding(ids, torch.randn(9, 2, 3))
    with pytest.raises(ValueError, match=r"mask: expected together with mask_embedding"):
        mf.factorized_embedding(ids, weight, mask=mask)
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.bool, got torch.int64"):
        mf.factorized_embedding(ids, weight, mask=ids, mask_embedding=vector)
    with pytest.raises(ValueError, match=r"mask: expected shape \(3, 5\) .*got \(5, 3\)"):
        mf.factorized_embedding(ids, weight, mask=mask.T, mask_embedding=vector)
    with pytest.raises(ValueError, match=r"mask_embedding: expected shape \(6,\), got \(5,\)"):
        mf.factorized_embedding(ids, weight, mask=mask, mask_embedding=vector[:5])
    with pytest.raises(TypeError, match=r"mask_embedding: expected dtype torch.float32"):
        mf.factorized_embedding(ids, weight, mask=mask, mask_embedding=vector.double())
