"""The kernel of causal_conv3d for compute capability 9.0: emulated here, and on a device of that kind."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from benchmarks import gpu_rows
from tests.cuda.test_causal_conv3d import Case, _conv, _inputs
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

op = importlib.import_module("magvit_fast.ops.causal_conv3d")  # the module, not the function

# Every branch of the plan: tiles cut at the edge of a frame, of the batch and of the channels; several
# tiles a block; sums over more than 64 channels; all maps of time; views and classes of strides.
CASES = {
    "part_of_a_tile": Case((64, 64), (2, 4, 5)),
    "whole_tiles": Case((64, 128), (2, 8, 16)),
    "ragged_everywhere": Case((72, 136), (2, 9, 17), (2, 3, 3)),
    "clips_share_a_tile": Case((64, 64), (2, 3, 3), batch=5),
    "large_tiles": Case((64, 64), (1, 16, 16), (1, 3, 3), batch=3),
    "one_image": Case((128, 64), (1, 8, 8)),
    "pointwise": Case((128, 72), (2, 5, 6), (1, 1, 1)),
    "history": Case((64, 64), (3, 4, 6), history=2),
    "history_of_clips": Case((64, 64), (2, 4, 4), history=2, batch=2),
    "short_history_replicated": Case((64, 64), (3, 4, 6), history=1, options={"time_mode": "replicate"}),
    "replicate": Case((64, 64), (3, 4, 4), options={"time_mode": "replicate"}),
    "reflect": Case((64, 64), (3, 4, 4), options={"time_mode": "reflect"}),
    "both_ends_of_time": Case(
        (64, 64), (3, 4, 4), options={"padding": (1, 1, 1, 1, 1, 1), "time_mode": "replicate"}
    ),
    "uneven_pads": Case((64, 64), (2, 5, 4), options={"padding": (2, 0, 0, 2, 2, 1)}),
    "no_pads_replicate": Case(
        (64, 64), (2, 5, 5), options={"padding": (2, 0, 0, 0, 0, 0), "space_mode": "replicate"}
    ),
    "stride_2": Case((64, 64), (3, 6, 7), (4, 4, 4), options={"stride": 2}),
    "stride_2_history": Case((64, 64), (4, 4, 5), history=2, options={"stride": 2}),
    "stride_skips_pixels": Case((64, 64), (4, 6, 7), (1, 1, 1), options={"stride": (2, 2, 2)}),
    "stride_and_dilation": Case(
        (64, 64), (4, 6, 7), options={"stride": (3, 1, 4), "dilation": (1, 2, 1)}
    ),
}  # fmt: skip

# Planes whose padding is written out first.
PADDED_PLANES = {
    "replicated_plane": Case(
        (64, 72), (2, 5, 6), history=1, options={"time_mode": "replicate", "space_mode": "replicate"}
    ),
    "replicated_stride_2": Case(
        (64, 64), (4, 6, 7), (4, 4, 4), options={"stride": 2, "space_mode": "replicate"}
    ),
    "mirrored_plane": Case((64, 64), (2, 4, 5), batch=2, options={"space_mode": "reflect"}),
}  # fmt: skip

# What stays with the portable kernels.
NOT_SERVED = {
    "float32": (Case((64, 64), (2, 4, 4)), torch.float32),
    "channels_below_64": (Case((56, 64), (2, 4, 4)), torch.bfloat16),
    "odd_channels": (Case((65, 64), (2, 4, 4)), torch.bfloat16),
    "groups": (Case((128, 128), (2, 4, 4), options={"groups": 2}), torch.bfloat16),
    "stride_3": (Case((64, 64), (2, 6, 6), options={"stride": (1, 3, 3)}), torch.bfloat16),
}  # fmt: skip


def _need_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.fixture
def device(device: torch.device) -> torch.device:
    if device.type == "cuda":
        _need_hopper()
    return device


def geometry_of(case: Case) -> Any:
    options = {"stride": 1, "dilation": 1, "groups": 1, "padding": None, **case.options}
    steps, spread = ((v,) * 3 if isinstance(v, int) else v
                     for v in (options["stride"], options["dilation"]))  # fmt: skip
    return op.Geometry(
        list(steps), list(spread), options["groups"],
        op.resolve_padding(case.kernel, spread, options["padding"]),
        options.get("time_mode", "zeros"), options.get("space_mode", "zeros"),
    )  # fmt: skip


def numbers_of(case: Case, dtype: torch.dtype) -> list[int]:
    inputs = _inputs(case, dtype, torch.device("cpu"))
    x, weight, _, *rest = inputs
    geometry = geometry_of(case)
    history = rest[0] if rest else None
    y_size = op._out_shape(x, weight, geometry)
    frames = 0 if history is None else history.shape[2]
    numbers: list[int] = op._shape_numbers(
        x.shape, frames, y_size, weight.shape[2:], dtype, geometry
    )
    return numbers


def _engines(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    numbers = numbers_of(case, dtype)
    core, where, how = _native.launcher(device)
    forward, backward = (
        core.causal_conv3d_engine(numbers, way, where, how) for way in (True, False)
    )
    return forward, backward


def test_cases_cover_both_tile_sizes() -> None:
    core = _native.core()
    pixels = set()
    for case in CASES.values():
        w, h, n = core.causal_conv3d_sm90_walk(numbers_of(case, torch.bfloat16), True, 3)[:3]
        pixels.add(w * h * n)
    assert pixels == {128, 256}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ["ragged_everywhere", "clips_share_a_tile", "large_tiles"])
def test_a_residual_is_added(name: str, bias: bool, device: torch.device) -> None:
    x, weight, shift = _inputs(CASES[name], torch.bfloat16, device)
    added = [shift] if bias else []
    exact = mf.causal_conv3d(*(t.double() for t in (x, weight, *added)), impl="reference")
    residual = torch.randn_like(exact).bfloat16()
    with _native.sm90a_kernels():
        y = mf.causal_conv3d(x, weight, *added, residual=residual, impl="native")
    plain = mf.causal_conv3d(x, weight, *added, residual=residual, impl="reference")
    assert_within_budget(y, plain, exact + residual.double())


def _value_and_gradients(
    inputs: list[Tensor], dy: Tensor, case: Case, impl: str
) -> tuple[Tensor, ...]:
    """Those of the input and the history; test_causal_conv3d_sm90_weight.py has that of the weight."""
    inputs = [t.detach() for t in inputs]
    leaves = [t.requires_grad_() for t in (inputs[0], *inputs[3:])]
    y = _conv(inputs, case, impl)
    return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))


@pytest.mark.parametrize("name", [*CASES, *PADDED_PLANES])
def test_values_and_gradients(name: str, device: torch.device) -> None:
    case = {**CASES, **PADDED_PLANES}[name]
    dtype = torch.float16 if name in ("whole_tiles", "stride_2_history") else torch.bfloat16
    inputs = _inputs(case, dtype, device)
    exact_inputs = [t.double() for t in inputs]
    dy = torch.randn_like(_conv(exact_inputs, case, "reference")).to(dtype)
    with _native.sm90a_kernels():
        assert _engines(case, dtype, device) == ("sm90a", "sm90a")
        actual = _value_and_gradients(inputs, dy, case, "native")
    plain = _value_and_gradients(inputs, dy, case, "reference")
    exact = _value_and_gradients(exact_inputs, dy, case, "reference")
    for part, a, p, e in zip(("y", "dx", "dhistory"), actual, plain, exact, strict=False):
        assert_within_budget(a, p, e, name=part)


def test_order_of_summation_is_that_of_the_taps(device: torch.device) -> None:
    # Tiles of 128 and of 256 pixels, cut differently, sum alike: a frame gives the same bits alone
    # and among others.
    case = Case((64, 64), (1, 16, 16), batch=2)
    inputs = _inputs(case, torch.bfloat16, device)
    with _native.sm90a_kernels():
        together = _conv(inputs, case, "native")
        alone = _conv([inputs[0][:1, :, :, :9, :9], *inputs[1:]], case, "native")
    assert_equal(together[:1, :, :, :8, :8], alone[:, :, :, :8, :8])


@pytest.mark.parametrize("name", NOT_SERVED)
def test_the_rest_is_left_to_the_portable_kernels(name: str, device: torch.device) -> None:
    case, dtype = NOT_SERVED[name]
    with _native.sm90a_kernels():
        assert "sm90a" not in _engines(case, dtype, device)
        inputs = _inputs(case, dtype, device)
        assert_equal(_conv(inputs, case, "native"), _portable(inputs, case))


def _portable(inputs: list[Tensor], case: Case) -> Tensor:
    with _native.sm90a_kernels(False):
        return _conv(inputs, case, "native")


def test_off_unless_asked_for(device: torch.device) -> None:
    assert not _native.sm90a()
    assert "sm90a" not in _engines(CASES["part_of_a_tile"], torch.bfloat16, device)


def test_addresses_off_16_bytes_take_the_plain_kernel(device: torch.device) -> None:
    case = CASES["part_of_a_tile"]
    inputs = _inputs(case, torch.bfloat16, device)
    x = inputs[0].contiguous(memory_format=torch.channels_last_3d)
    store = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:]
    shifted = store.as_strided(x.shape, x.stride()).copy_(x)
    with _native.sm90a_kernels():
        actual = _conv([shifted, *inputs[1:]], case, "native")
    plain = _conv(inputs, case, "reference")
    assert_within_budget(actual, plain, _conv([t.double() for t in inputs], case, "reference"))


@pytest.mark.cuda
@pytest.mark.parametrize("problem", list(gpu_rows.conv_problems()), ids=lambda p: p["name"])
def test_layers_of_the_tokenizer(problem: dict[str, Any]) -> None:
    """Real sizes: as close to float32 as the portable kernels, twice the same bits."""
    _need_hopper()
    device = torch.device("cuda")
    case = Case(tuple(problem["channels"]), tuple(problem["size"]), tuple(problem["kernel"]),
                min(problem["batch"], 2), options={"stride": tuple(problem["stride"])})  # fmt: skip
    if "sm90a" not in _with_sm90a(_engines, case, torch.bfloat16, device):
        pytest.skip("left to the portable kernels")
    inputs = _inputs(case, torch.bfloat16, device)[:2]

    def forward_and_dx(impl: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = tensors[0].detach().requires_grad_()
        y = mf.causal_conv3d(x, tensors[1], stride=case.options["stride"], impl=impl)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = forward_and_dx("reference", [t.float() for t in inputs])
    portable = forward_and_dx("native", inputs)
    actual = _with_sm90a(forward_and_dx, "native", inputs)
    again = _with_sm90a(forward_and_dx, "native", inputs)
    for a, b, p, e in zip(actual, again, portable, exact, strict=True):
        assert_equal(a, b, name="the second run")
        error, allowed = ((t.float() - e).norm() / e.norm() for t in (a, p))
        assert float(error) <= 1.1 * float(allowed)


def _with_sm90a(call: Any, *arguments: Any) -> Any:
    with _native.sm90a_kernels():
        return call(*arguments)


@pytest.mark.cuda
def test_graph_replay_and_side_stream() -> None:
    _need_hopper()
    case = dataclasses.replace(CASES["ragged_everywhere"], batch=3)
    static = _inputs(case, torch.bfloat16, torch.device("cuda"))
    with _native.sm90a_kernels():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _conv(static, case, "native")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = _conv(static, case, "native")
        fresh = _inputs(case, torch.bfloat16, torch.device("cuda"))
        for to, source in zip(static, fresh, strict=True):
            to.copy_(source)
        graph.replay()
        assert_equal(y, _conv(fresh, case, "native"))
