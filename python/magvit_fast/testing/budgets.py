"""Error budgets: a kernel may err at most twice as much as plain torch in the same dtype.

Both errors are taken against the same computation in float64, so no tolerance is guessed:

    max |actual - exact| <= factor * (max |plain - exact| + eps(dtype) * max |exact|)

The second term is one rounding of the largest value; it keeps the budget sensible where plain torch
happens to be exact. Integers must be equal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _describe_worst(actual: Tensor, exact: Tensor, error: Tensor, allowed: float) -> str:
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    share = float((error > allowed).double().mean())
    return (
        f"worst at {index}: got {actual.flatten()[worst].item():.9g}, "
        f"expected {exact.flatten()[worst].item():.9g}; {100 * share:.3g} % of values beyond it"
    )


def _check_alike(name: str, actual: Tensor, other_name: str, other: Tensor) -> None:
    if actual.shape != other.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)} differs from that of {other_name}, "
            f"{tuple(other.shape)}"
        )


def assert_within_budget(
    actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """Assert that `actual` is as good as plain torch, up to `factor`.

    Args:
        actual: the kernel's result.
        plain: plain torch's result in the same dtype, of the same shape.
        exact: the same computation in float64.
        factor: how much larger than plain torch's the error may be.
        name: what the message calls the result.

    Raises:
        AssertionError: shapes or dtypes differ, a value is not finite where the exact one is, or the
            error exceeds the budget; the message has the worst index and the share of bad values.
    """
    _check_alike(name, actual, "plain", plain)
    _check_alike(name, actual, "exact", exact)
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, but plain torch gives {plain.dtype}")
    if actual.numel() == 0:
        return
    if not actual.is_floating_point():
        assert_equal(actual, exact, name=name)
        return
    got, want = actual.detach().double().cpu(), exact.detach().double().cpu()
    error = (got - want).abs()
    both_alike = (got == want) | (got.isnan() & want.isnan())  # equal infinities, NaN for NaN
    error = torch.where(both_alike, 0.0, error.nan_to_num(nan=torch.inf))
    plain_error = (plain.detach().double().cpu() - want).abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    allowed = factor * (float(plain_error.max()) + torch.finfo(actual.dtype).eps * scale)
    if float(error.max()) > allowed:
        raise AssertionError(
            f"{name}: error {float(error.max()):.3g} exceeds the budget {allowed:.3g} = {factor:g} x "
            f"(plain torch's {float(plain_error.max()):.3g} + eps x {scale:.3g}); "
            + _describe_worst(got, want, error, allowed)
        )


def assert_equal(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Assert bit-for-bit equal values (NaN equals NaN), reporting the worst index otherwise."""
    _check_alike(name, actual, "expected", expected)
    if actual.dtype != expected.dtype and (
        actual.is_floating_point() or expected.is_floating_point()
    ):
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {expected.dtype}")
    got, want = actual.detach().cpu(), expected.detach().cpu()
    same = (got == want) | ((got != got) & (want != want))
    if not bool(same.all()):
        wide = torch.float64 if got.is_floating_point() else torch.int64
        error = (got.to(wide) - want.to(wide)).abs().double().nan_to_num(nan=torch.inf)
        error = torch.where(same, 0.0, error)
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} values differ; "
            + _describe_worst(got.double(), want.double(), error, 0.0)
        )
