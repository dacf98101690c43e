"""The kernels of causal_conv3d for layers with a few channels on one side: against float64, and which serve."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.cuda.test_causal_conv3d import (
    Case,
    _conv,
    _inputs,
    _value_and_gradients,
    assert_all_within_budget,
)
from tests.cuda.test_causal_conv3d_sm90 import numbers_of

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

# Every branch: one quad of channels and two, sums of 3 and 4 column tiles and of 9, columns past the
# end, several tiles of rows, of columns, of boxes and of time; all maps of every axis.
CASES = {
    "in_3": Case((3, 16), (3, 5, 6)),
    "in_1": Case((1, 24), (2, 4, 5), (2, 2, 3)),
    "in_8": Case((8, 72), (2, 4, 5), (2, 3, 3), batch=2),
    "in_3_wide": Case((3, 136), (2, 4, 5), (1, 2, 3)),
    "in_rows": Case((2, 16), (2, 20, 31), (2, 1, 3), batch=2),
    "in_stride": Case((3, 16), (5, 6, 7), options={"stride": (2, 1, 2)}),
    "in_dilation": Case((4, 16), (4, 6, 6), options={"dilation": (2, 1, 2)}),
    "in_replicate": Case(
        (3, 16), (3, 4, 5), options={"time_mode": "replicate", "space_mode": "replicate"}
    ),
    "in_reflect": Case((3, 16), (3, 4, 5), options={"time_mode": "reflect", "space_mode": "reflect"}),
    "in_history": Case((3, 16), (3, 4, 4), history=2, batch=2),
    "out_3": Case((16, 3), (3, 5, 6)),
    "out_1": Case((24, 1), (2, 4, 5), (2, 2, 3)),
    "out_8": Case((16, 8), (2, 6, 9), (2, 3, 3), batch=2),
    "out_5": Case((72, 5), (2, 4, 5)),
    "out_3_deep": Case((136, 3), (2, 3, 4), (3, 1, 2)),
    "out_boxes": Case((16, 3), (2, 19, 22), (1, 3, 3)),
    "out_spans": Case((16, 2), (6, 3, 4), (3, 1, 3)),
    "out_pointwise": Case((40, 4), (2, 5, 6), (1, 1, 1)),
    "out_stride": Case((16, 3), (5, 6, 7), options={"stride": 2}),
    "out_dilation": Case((16, 3), (2, 6, 6), options={"dilation": (1, 2, 1)}),
    "out_replicate": Case(
        (16, 3), (3, 4, 5), options={"time_mode": "replicate", "space_mode": "replicate"}
    ),
    "out_reflect": Case(
        (16, 3), (3, 4, 5), options={"time_mode": "reflect", "space_mode": "reflect"}
    ),
    "out_replicate_stride": Case(
        (16, 3), (5, 5, 6), batch=2,
        options={"stride": 2, "time_mode": "replicate", "space_mode": "reflect"},
    ),
    "out_both_ends": Case(
        (16, 3), (3, 4, 4), options={"padding": (1, 1, 0, 2, 1, 0), "time_mode": "replicate"}
    ),
    "out_history": Case((16, 3), (3, 4, 4), history=2, batch=2),
    "out_short_history": Case((16, 3), (3, 4, 4), history=1, options={"time_mode": "replicate"}),
}  # fmt: skip

# (forward pass, input gradient, weight gradient): what other kernels keep.
NOT_SERVED = {
    "float32": (Case((3, 16), (2, 4, 4)), torch.float32, ("fma", "fma", "fma")),
    "odd_channels": (Case((3, 17), (2, 4, 4)), torch.bfloat16, ("fma", "fma", "fma")),
    "narrow": (Case((8, 8), (2, 4, 4)), torch.bfloat16, ("mma", "mma", "mma")),
    "nine": (Case((9, 16), (2, 4, 4)), torch.bfloat16, ("fma", "fma", "fma")),
    "groups": (Case((32, 8), (2, 4, 4), options={"groups": 2}), torch.bfloat16, ("mma", "fma", "fma")),
    "input_gradient_of_images": (Case((3, 16), (2, 4, 4)), torch.bfloat16, ("thin", "fma", "thin")),
    "four_frames": (Case((16, 3), (4, 4, 4), (4, 3, 3)), torch.bfloat16, ("mma", "thin", "thin")),
    "dilated_time": (
        Case((16, 3), (4, 4, 4), options={"dilation": (2, 1, 1)}), torch.bfloat16,
        ("mma", "thin", "thin"),
    ),
}  # fmt: skip


def _engines(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[str, str, str]:
    core, where, how = _native.launcher(device)
    numbers = numbers_of(case, dtype)
    forward, backward = (
        core.causal_conv3d_engine(numbers, way, where, how) for way in (True, False)
    )
    return forward, backward, core.causal_conv3d_weight_grad_engine(numbers, where, how)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, device: torch.device) -> None:
    case = CASES[name]
    dtype = torch.float16 if name in ("in_3_wide", "out_3", "out_5") else torch.bfloat16
    engines = _engines(case, dtype, device)
    assert engines[0] == engines[2] == "thin"
    assert (engines[1] == "thin") == name.startswith("out")
    assert_all_within_budget(case, dtype, device)


@pytest.mark.parametrize("channels", [(3, 24), (24, 3)])
def test_a_residual_is_added(channels: tuple[int, int], device: torch.device) -> None:
    case = Case(channels, (2, 5, 6), batch=2)
    x, weight, bias = _inputs(case, torch.bfloat16, device)
    residual = torch.randn(2, channels[1], 2, 5, 6, device=device, dtype=torch.bfloat16)
    y, plain = (
        mf.causal_conv3d(x, weight, bias, residual=residual, impl=impl)
        for impl in ("native", "reference")
    )
    exact = mf.causal_conv3d(x.double(), weight.double(), bias.double(), impl="reference")
    assert_within_budget(y, plain, exact + residual.double())


@pytest.mark.parametrize("channels", [(3, 16), (16, 3)])
def test_two_runs_give_the_same_bits(channels: tuple[int, int], device: torch.device) -> None:
    # 1152 pixels: five parts of the weight gradient's sum, the last one shorter.
    case = Case(channels, (3, 12, 16), (1, 1, 2), batch=2)
    inputs = _inputs(case, torch.bfloat16, device)
    dy = torch.randn(2, channels[1], 3, 12, 16, device=device, dtype=torch.bfloat16)
    actual = _value_and_gradients(inputs, dy, case, "native")
    again = _value_and_gradients(inputs, dy, case, "native")
    plain = _value_and_gradients(inputs, dy, case, "reference")
    exact = _value_and_gradients([t.double() for t in inputs], dy, case, "reference")
    for a, b, p, e in zip(actual, again, plain, exact, strict=True):
        assert_equal(a, b, name="the second run")
        assert_within_budget(a, p, e)


def test_a_clip_gives_the_same_bits_alone(device: torch.device) -> None:
    # Time is cut into pieces where clips are few: the sums stay the same.
    case = Case((16, 3), (6, 4, 4), batch=2)
    inputs = _inputs(case, torch.bfloat16, device)
    together = _conv(inputs, case, "native")
    alone = _conv([inputs[0][:1], *inputs[1:]], dataclasses.replace(case, batch=1), "native")
    assert_equal(together[:1], alone)


@pytest.mark.parametrize("channels", [(3, 16), (16, 3)])
def test_no_clips_give_no_gradient(channels: tuple[int, int], device: torch.device) -> None:
    case = Case(channels, (2, 4, 4), batch=0)
    inputs = _inputs(case, torch.bfloat16, device)
    dy = torch.empty(0, channels[1], 2, 4, 4, device=device, dtype=torch.bfloat16)
    y, dx, dweight, _ = _value_and_gradients(inputs, dy, case, "native")
    assert (y.shape, dx.shape) == (dy.shape, inputs[0].shape)
    assert_equal(dweight, torch.zeros_like(dweight))


@pytest.mark.parametrize("channels", [(3, 16), (16, 3)])
def test_nothing_outside_is_read_as_a_number(
    channels: tuple[int, int], device: torch.device
) -> None:
    # One pixel that is no number spoils the outputs that read it and no other.
    case = Case(channels, (2, 5, 6), (1, 3, 3))
    inputs = _inputs(case, torch.bfloat16, device)
    inputs[0][0, :, 0, 0, 0] = float("nan")
    y = _conv(inputs, case, "native")
    expected = torch.zeros(2, 5, 6, dtype=torch.bool, device=device)
    expected[0, :2, :2] = True
    assert bool((y[0].isnan() == expected).all())


@pytest.mark.parametrize("name", NOT_SERVED)
def test_the_rest_is_left_to_other_kernels(name: str, device: torch.device) -> None:
    case, dtype, engines = NOT_SERVED[name]
    assert _engines(case, dtype, device) == engines


@pytest.mark.cuda
@pytest.mark.parametrize("channels", [(3, 128), (128, 3)])
def test_wide_tensors_beyond_31_bits(channels: tuple[int, int]) -> None:
    """More than 2^31 elements on the wide side: the last rows are those of the last rows alone."""
    side = 2900  # 2 x 2900 x 2900 pixels of 128 channels
    device, layout = torch.device("cuda"), torch.channels_last_3d
    c_in, c_out = channels
    weight = torch.randn(c_out, c_in, 1, 3, 3, device=device, dtype=torch.bfloat16) / 30
    x = torch.randn(1, 2, side, side, c_in, device=device, dtype=torch.bfloat16).movedim(-1, 1)
    assert x.is_contiguous(memory_format=layout)
    assert max(channels) * 2 * side * side > 2**31
    y = mf.causal_conv3d(x, weight, impl="native")
    tail = x[:, :, :, -16:].contiguous(memory_format=layout)
    assert_equal(
        y[:, :, :, -8:], mf.causal_conv3d(tail, weight, impl="native")[:, :, :, -8:], name="y"
    )
    geometry = ([1, 1, 1], [1, 1, 1], 1, [0, 0, 1, 1, 1, 1], "zeros", "zeros")
    ops = torch.ops.magvit_fast
    dy = torch.zeros_like(y)  # nothing before the tail, so that it gives the whole gradient
    dy[:, :, :, -8:] = torch.randn_like(dy[:, :, :, -8:])
    dy_tail = dy[:, :, :, -16:].contiguous(memory_format=layout)
    whole, part = (
        ops.causal_conv3d_weight_grad(a, None, b, [1, 3, 3], *geometry)
        for a, b in ((x, dy), (tail, dy_tail))
    )
    assert float((whole - part).norm() / part.norm()) < 1e-2  # other parts, other roundings
    if c_out == 3:
        whole, part = (
            ops.causal_conv3d_input_grad(b, weight, list(a.shape), 0, True, *geometry)[0]
            for a, b in ((x, dy), (tail, dy_tail))
        )
        assert_equal(whole[:, :, :, -8:], part[:, :, :, -8:], name="dx")
