"""The weight gradient of causal_conv3d for compute capability 9.0: emulated here, and on a device of that kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from benchmarks import gpu_rows
from tests.cuda import test_causal_conv3d_sm90 as sm90
from tests.cuda.test_causal_conv3d import Case, _conv, _inputs
from torch import Tensor

from magvit_fast import _native
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

device = sm90.device  # the fixture

# Beside those of the forward kernel: several tiles of channels, runs of one, two and three taps, pieces that
# begin and end inside of a tile, rings that go round.
CASES = {
    **sm90.CASES,
    "tiles_of_channels": Case((136, 192), (1, 4, 9), (1, 3, 1)),
    "runs_of_two": Case((64, 64), (3, 7, 9), (2, 4, 2)),
    "one_row_of_taps": Case((64, 72), (2, 9, 17), (1, 1, 3)),
    "many_pieces": Case((64, 64), (2, 17, 12), batch=2),
    "no_pads": Case((64, 64), (2, 10, 11), (2, 3, 3), options={"padding": (1, 0, 0, 0, 0, 0)}),
}

AGAIN = ("whole_tiles", "stride_2_history", "many_pieces")  # run twice in the emulator, too


NOT_SERVED = {
    **sm90.NOT_SERVED,
    "many_taps_of_time": (Case((64, 64), (1, 2, 2), (17, 1, 1)), torch.bfloat16),
}


def _weight_grad(x: Tensor, history: Tensor | None, dy: Tensor, case: Case) -> Tensor:
    result: Tensor = torch.ops.magvit_fast.causal_conv3d_weight_grad(
        x, history, dy, list(case.kernel), *sm90.geometry_of(case)
    )
    return result


def _native_gradient(inputs: list[Tensor], dy: Tensor, case: Case, sm90a: bool = True) -> Tensor:
    with _native.sm90a_kernels(sm90a):
        return _weight_grad(inputs[0], inputs[3] if case.history else None, dy, case)


def _reference_gradient(inputs: list[Tensor], dy: Tensor, case: Case) -> Tensor:
    weight = inputs[1].detach().requires_grad_()
    y = _conv([inputs[0], weight, *inputs[2:]], case, "reference")
    return torch.autograd.grad(y, weight, dy.to(y.dtype))[0]


def _engine(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    core, where, how = _native.launcher(device)
    engine: str = core.causal_conv3d_weight_grad_engine(sm90.numbers_of(case, dtype), where, how)
    return engine


def _draw(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    inputs = _inputs(case, dtype, device)
    y = _conv([t.double() for t in inputs], case, "reference")
    return inputs, torch.randn_like(y).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, device: torch.device) -> None:
    case = CASES[name]
    dtype = torch.float16 if name in ("whole_tiles", "stride_2_history") else torch.bfloat16
    inputs, dy = _draw(case, dtype, device)
    with _native.sm90a_kernels():
        assert _engine(case, dtype, device) == "sm90a"
    actual = _native_gradient(inputs, dy, case)
    if device.type == "cuda" or name in AGAIN:
        assert_equal(_native_gradient(inputs, dy, case), actual, name="the second run")
    plain = _reference_gradient(inputs, dy, case)
    exact = _reference_gradient([t.double() for t in inputs], dy.double(), case)
    assert_within_budget(actual, plain, exact)


def test_cases_cover_the_runs_of_taps_and_the_pieces_of_tiles() -> None:
    longest, pieces = set(), set()
    for case in CASES.values():
        head, _, sums = _native.core().causal_conv3d_sm90_weight_walk(
            sm90.numbers_of(case, torch.bfloat16)
        )
        if not head:  # a plane whose padding is written out before
            continue
        longest.add(head[0][3])
        pieces |= {len(slots) for slots in sums}
    assert longest == {1, 2, 3}
    assert {0, 1, 2, 3} <= pieces  # 0: a tap of time that reads padding alone


@pytest.mark.parametrize("name", NOT_SERVED)
def test_the_rest_is_left_to_the_portable_kernels(name: str, device: torch.device) -> None:
    case, dtype = NOT_SERVED[name]
    with _native.sm90a_kernels():
        assert _engine(case, dtype, device) != "sm90a"
    inputs, dy = _draw(case, dtype, device)
    portable = _native_gradient(inputs, dy, case, sm90a=False)
    assert_equal(_native_gradient(inputs, dy, case), portable)


def test_off_unless_asked_for(device: torch.device) -> None:
    assert _engine(CASES["part_of_a_tile"], torch.bfloat16, device) == "mma"


def test_addresses_off_16_bytes_take_the_plain_kernel(device: torch.device) -> None:
    case = CASES["part_of_a_tile"]
    inputs, dy = _draw(case, torch.bfloat16, device)
    x = inputs[0].contiguous(memory_format=torch.channels_last_3d)
    store = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:]
    shifted = store.as_strided(x.shape, x.stride()).copy_(x)
    actual = _native_gradient([shifted, *inputs[1:]], dy, case)
    exact = _reference_gradient([t.double() for t in inputs], dy.double(), case)
    assert_within_budget(actual, _reference_gradient(inputs, dy, case), exact)


def test_gradient_through_autograd(device: torch.device) -> None:
    # The switch reaches the backward pass; all three passes by kernels for compute capability 9.0.
    case = CASES["history"]
    inputs, dy = _draw(case, torch.bfloat16, device)
    weight = inputs[1].detach().requires_grad_()
    with _native.sm90a_kernels():
        y = _conv([inputs[0], weight, *inputs[2:]], case, "native")
        (through,) = torch.autograd.grad(y, weight, dy)
    assert_equal(through, _native_gradient(inputs, dy, case))


@pytest.mark.cuda
@pytest.mark.parametrize("problem", list(gpu_rows.conv_problems()), ids=lambda p: p["name"])
def test_layers_of_the_tokenizer(problem: dict[str, Any]) -> None:
    """Real sizes: about as close to float32 as the portable kernel, twice the same bits."""
    sm90._need_hopper()
    device = torch.device("cuda")
    case = Case(tuple(problem["channels"]), tuple(problem["size"]), tuple(problem["kernel"]),
                min(problem["batch"], 2), options={"stride": tuple(problem["stride"])})  # fmt: skip
    with _native.sm90a_kernels():
        if _engine(case, torch.bfloat16, device) != "sm90a":
            pytest.skip("left to the portable kernels")
    inputs = _inputs(case, torch.bfloat16, device)
    size = sm90.op._out_shape(inputs[0], inputs[1], sm90.geometry_of(case))
    dy = torch.randn(size, device=device, dtype=torch.bfloat16)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = _reference_gradient([t.float() for t in inputs], dy.float(), case)
    actual = _native_gradient(inputs, dy, case)
    assert_equal(_native_gradient(inputs, dy, case), actual, name="the second run")
    portable = _native_gradient(inputs, dy, case, sm90a=False)
    error, allowed = ((t.float() - exact).norm() / exact.norm() for t in (actual, portable))
    assert float(error) <= 1.1 * float(allowed)


@pytest.mark.cuda
def test_graph_replay_and_side_stream() -> None:
    sm90._need_hopper()
    case = dataclasses.replace(CASES["ragged_everywhere"], batch=3)
    static = _draw(case, torch.bfloat16, torch.device("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _native_gradient(*static, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dweight = _native_gradient(*static, case)
    fresh = _draw(case, torch.bfloat16, torch.device("cuda"))
    for to, source in zip((*static[0], static[1]), (*fresh[0], fresh[1]), strict=True):
        to.copy_(source)
    graph.replay()
    assert_equal(dweight, _native_gradient(*fresh, case))


@pytest.mark.cuda
def test_pixels_beyond_32_bits() -> None:
    # What counts lies beyond 2**31 elements of x and, in bytes, of dy.
    sm90._need_hopper()
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    case = Case((128, 64), (17, 1024, 1024), (1, 3, 3))
    x, dy = (
        torch.zeros((1, channels, *case.size), device="cuda", dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last_3d
        )
        for channels in case.channels
    )
    assert x.numel() > 2**31
    x[:, :, -1, -5:, -5:] = torch.randn(1, 128, 5, 5, device="cuda", dtype=torch.bfloat16)
    dy[:, :, -1, -3:, -3:] = torch.randn(1, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(64, 128, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    inputs = [x, weight, torch.zeros(64, device="cuda", dtype=torch.bfloat16)]
    actual = _native_gradient(inputs, dy, case)
    corner = [t[:, :, -1:, -8:, -8:].contiguous() for t in (x, dy)]
    exact = _reference_gradient([corner[0].double(), *(t.double() for t in inputs[1:])],
                                corner[1].double(), case)  # fmt: skip
    torch.testing.assert_close(actual.double(), exact, rtol=1e-2, atol=1e-2)
