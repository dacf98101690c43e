"""The CUDA kernels of causal_conv3d: values and gradients of every path against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal, assert_within_budget


@dataclasses.dataclass(frozen=True)
class Case:
    channels: tuple[int, int]
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    batch: int = 1
    history: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# The smallest shapes that reach every branch: several row tiles (more than 128 pixels), several column
# tiles, a last chunk of channels that is not full, groups, thin layers, all paddings on every axis.
CASES = {
    "one_tile": Case((8, 8), (2, 4, 5)),
    "two_row_tiles": Case((16, 24), (3, 6, 9), batch=2),
    "two_column_tiles": Case((16, 136), (2, 3, 4), (2, 1, 3)),
    "deep_sum": Case((72, 40), (2, 3, 3), (1, 3, 3)),
    "wide_input_gradient": Case((136, 8), (2, 3, 3), (1, 1, 2)),
    "thin_in": Case((3, 16), (3, 5, 4)),
    "thin_out": Case((16, 3), (3, 5, 4)),
    "odd": Case((5, 7), (3, 5, 4), (2, 2, 3)),
    "pointwise": Case((24, 8), (2, 5, 6), (1, 1, 1)),
    "groups": Case((32, 16), (2, 4, 4), options={"groups": 2}),
    "odd_groups": Case((6, 9), (2, 4, 4), options={"groups": 3}),
    "stride_2": Case((8, 16), (5, 6, 7), options={"stride": 2}),
    "stride_on_two_axes": Case((8, 8), (3, 7, 5), options={"stride": (1, 2, 3)}),
    "stride_skips_pixels": Case((8, 8), (5, 5, 5), (1, 1, 1), options={"stride": 3}),
    "dilation": Case((8, 8), (4, 6, 6), options={"dilation": (2, 1, 2)}),
    "replicate": Case(
        (8, 8), (4, 4, 5), options={"time_mode": "replicate", "space_mode": "replicate"}
    ),
    "reflect": Case((8, 8), (4, 4, 5), options={"time_mode": "reflect", "space_mode": "reflect"}),
    "replicate_stride": Case(
        (8, 8), (5, 6, 7),
        options={"stride": 2, "time_mode": "replicate", "space_mode": "replicate"},
    ),
    "reflect_stride_dilation": Case(
        (8, 8), (6, 6, 7),
        options={"stride": (2, 2, 1), "dilation": (2, 1, 2), "time_mode": "reflect",
                 "space_mode": "reflect"},
    ),
    "both_ends_of_time": Case(
        (8, 8), (4, 4, 4), options={"padding": (1, 1, 0, 2, 1, 0), "time_mode": "replicate"}
    ),
    "history": Case((8, 8), (3, 4, 4), history=2),
    "history_too_short": Case((8, 8), (3, 4, 4), history=1, options={"time_mode": "replicate"}),
    "history_reflected": Case(
        (8, 8), (3, 4, 4), (4, 3, 3), history=1, batch=2, options={"time_mode": "reflect"}
    ),
    "history_stride": Case((3, 8), (4, 4, 4), history=2, options={"stride": (2, 2, 2)}),
    "one_frame": Case((8, 8), (1, 6, 6), options={"time_mode": "replicate"}),
    "more_taps_than_the_mask": Case((8, 8), (1, 1, 60), (1, 1, 66)),
}  # fmt: skip


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    groups = case.options.get("groups", 1)
    c_in, c_out = case.channels
    scale = (c_in // groups * case.kernel[0] * case.kernel[1] * case.kernel[2]) ** -0.5
    inputs = [
        torch.randn(case.batch, c_in, *case.size),
        torch.randn(c_out, c_in // groups, *case.kernel) * scale,
        torch.randn(c_out),
    ]
    if case.history:
        inputs.append(torch.randn(case.batch, c_in, case.history, *case.size[1:]))
    return [t.to(device, dtype) for t in inputs]


def _conv(inputs: list[Tensor], case: Case, impl: str) -> Tensor:
    x, weight, bias, *rest = inputs
    history = rest[0] if rest else None
    return mf.causal_conv3d(x, weight, bias, history=history, impl=impl, **case.options)


def _value_and_gradients(
    inputs: list[Tensor], dy: Tensor, case: Case, impl: str
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = _conv(leaves, case, impl)
    return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))


def assert_all_within_budget(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """The result and every gradient of a case against float64."""
    inputs = _inputs(case, dtype, device)
    exact_inputs = [t.double() for t in inputs]
    dy = torch.randn_like(_conv(exact_inputs, case, "reference")).to(dtype)
    actual = _value_and_gradients(inputs, dy, case, "native")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = _value_and_gradients(inputs, dy, case, "reference")
        exact = _value_and_gradients(exact_inputs, dy, case, "reference")
    names = ("y", "dx", "dweight", "dbias", "dhistory")
    for part, a, p, e in zip(names, actual, plain, exact, strict=False):
        assert_within_budget(a, p, e, name=part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_all_within_budget(CASES[name], dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [(8, 6), (8, 5), (3, 4)])
def test_a_residual_is_added(
    channels: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(channels, (2, 5, 6), batch=2)
    inputs = _inputs(case, dtype, device)
    residual = torch.randn(2, channels[1], 2, 5, 6, device=device, dtype=dtype)
    x, weight, bias = inputs
    y, plain = (
        mf.causal_conv3d(x, weight, bias, residual=residual, impl=impl)
        for impl in ("native", "reference")
    )
    exact = _conv([t.double() for t in inputs], case, "reference") + residual.double()
    assert_within_budget(y, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_of_many_parts(dtype: torch.dtype, device: torch.device) -> None:
    # 2 x 3 x 12 x 16 = 1152 pixels: five parts of the sum over pixels, the last one shorter.
    case = Case((8, 8), (3, 12, 16), (1, 1, 2), batch=2)
    inputs = _inputs(case, dtype, device)
    dy = torch.randn(2, 8, 3, 12, 16, device=device, dtype=dtype)
    actual = _value_and_gradients(inputs, dy, case, "native")
    again = _value_and_gradients(inputs, dy, case, "native")
    plain = _value_and_gradients(inputs, dy, case, "reference")
    exact = _value_and_gradients([t.double() for t in inputs], dy, case, "reference")
    for a, b, p, e in zip(actual, again, plain, exact, strict=True):
        assert_within_budget(a, p, e)
        assert_equal(a, b, name="the second run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_off_16_bytes_take_the_plain_kernel(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES["one_tile"]
    inputs = _inputs(case, dtype, device)
    x = inputs[0].contiguous(memory_format=torch.channels_last_3d)
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].as_strided(
        x.shape, x.stride()
    )
    shifted.copy_(x)
    assert shifted.data_ptr() % 16 != 0
    dy = torch.randn(1, 8, 2, 4, 5, device=device, dtype=dtype)
    actual = _value_and_gradients([shifted, *inputs[1:]], dy, case, "native")
    plain = _value_and_gradients(inputs, dy, case, "reference")
    exact = _value_and_gradients([t.double() for t in inputs], dy, case, "reference")
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_within_budget(a, p, e)


def test_second_derivative(device: torch.device) -> None:
    case = dataclasses.replace(CASES["history_too_short"], channels=(4, 4))

    def penalty(inputs: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = _conv(leaves, case, impl)
        (dx,) = torch.autograd.grad(y.sin().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    inputs = _inputs(case, torch.float32, device)
    actual = penalty(inputs, "native")
    plain = penalty(inputs, "reference")
    exact = penalty([t.double() for t in inputs], "reference")
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_within_budget(a, p, e)
