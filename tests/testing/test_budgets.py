"""The assertion helpers fail when they should."""

from __future__ import annotations

import pytest
import torch

from magvit_fast.testing.budgets import assert_equal, assert_within_budget


def _case(dtype=torch.float32):
    exact = torch.linspace(-3, 5, 60, dtype=torch.float64).view(3, 4, 5)
    plain = exact.to(dtype) + torch.full((3, 4, 5), 0.01).to(dtype)
    return exact, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_plain_torch_passes(dtype):
    exact, plain = _case(dtype)
    assert_within_budget(plain, plain, exact)
    assert_within_budget(exact.to(dtype), plain, exact)


def test_error_beyond_twice_fails_and_names_the_place():
    exact, plain = _case()
    bad = exact.float()
    bad[1, 2, 3] += 0.021
    with pytest.raises(AssertionError, match=r"grad: .*worst at \(1, 2, 3\).*1\.67 %"):
        assert_within_budget(bad, plain, exact, name="grad")


def test_factor_is_respected():
    exact, plain = _case()
    bad = exact.float() + 0.015
    assert_within_budget(bad, plain, exact)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(bad, plain, exact, factor=1.0)


def test_an_exact_plain_result_leaves_one_rounding():
    exact = torch.full((8,), 2.0, dtype=torch.float64)
    plain = exact.float()
    assert_within_budget(plain + 2.0**-22, plain, exact)
    with pytest.raises(AssertionError):
        assert_within_budget(plain + 2.0**-20, plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail(value):
    exact, plain = _case()
    bad = plain.clone()
    bad[0, 0, 0] = value
    with pytest.raises(AssertionError, match=r"worst at \(0, 0, 0\)"):
        assert_within_budget(bad, plain, exact)


def test_plain_torch_overflow_does_not_widen_the_budget():
    exact, plain = _case()
    plain[0, 0, 0] = float("inf")
    with pytest.raises(AssertionError):
        assert_within_budget(exact.float() + 1.0, plain, exact)


def test_the_same_infinities_and_nans_pass():
    exact, plain = _case()
    exact[0, 0, :2] = torch.tensor([float("nan"), float("inf")], dtype=torch.float64)
    assert_within_budget(exact.float(), plain, exact)


def test_shape_and_dtype_must_match():
    exact, plain = _case()
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(plain[0], plain, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(plain.bfloat16(), plain, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_equal(plain, plain.double())


def test_equal():
    x = torch.tensor([[1.0, float("nan")], [3.0, float("inf")]])
    assert_equal(x, x.clone())
    y = x.clone()
    y[1, 0] = 3.0000002
    with pytest.raises(AssertionError, match=r"1 of 4 values differ; worst at \(1, 0\)"):
        assert_equal(y, x)
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_equal(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_within_budget(*(torch.tensor([1, 2, 3]),) * 2, torch.tensor([1, 2, 4]))


def test_empty_passes():
    empty = torch.empty(0, 3)
    assert_within_budget(empty, empty, empty.double())
    assert_equal(empty, empty)
