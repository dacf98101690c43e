"""What the convolution's CUDA kernels make of their result on the way: statistics, depth to space; and
the packed weights that they are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tests.cuda.test_causal_conv3d import Case, _inputs
from tests.cuda.test_causal_conv3d_sm90 import CASES, PADDED_PLANES
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.ops import _conv_fused, _packed_weights
from magvit_fast.testing.budgets import assert_equal, assert_within_budget


@pytest.fixture(params=[True, False], ids=["sm90a", "portable"])
def device(request: pytest.FixtureRequest, device: torch.device) -> Iterator[torch.device]:
    if request.param and device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    with _native.sm90a_kernels(request.param):
        yield device


def _moments(y: Tensor, groups: int, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std of each group in float64, [spans, groups]."""
    clips = y.double()
    spans = clips.transpose(1, 2).flatten(0, 1) if per_frame else clips
    spans = spans.unflatten(1, (groups, -1)).flatten(2)
    return spans.mean(2), (spans.var(2, correction=0) + 1e-6).rsqrt()


@pytest.mark.parametrize("per_frame", [True, False], ids=["frames", "clips"])
@pytest.mark.parametrize(
    "name",
    ["ragged_everywhere", "clips_share_a_tile", "large_tiles", "history", "replicated_plane"],
)
def test_statistics_are_those_of_the_result(
    name: str, per_frame: bool, device: torch.device
) -> None:
    case = {**CASES, **PADDED_PLANES}[name]
    x, weight, bias, *rest = _inputs(case, torch.bfloat16, device)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    bias = bias + 100  # a mean far from zero
    history = rest[0] if rest else None
    plain = mf.causal_conv3d(x, weight, bias, history=history, impl="native", **case.options)
    residual = torch.randn_like(plain)
    for added in (None, residual):
        expected = plain if added is None else mf.causal_conv3d(
            x, weight, bias, history=history, residual=added, impl="native", **case.options
        )  # fmt: skip
        y, stats = _conv_fused.causal_conv3d_statistics(
            x, weight, bias, num_groups=8, per_frame=per_frame, eps=1e-6, history=history,
            residual=added, **case.options,
        )  # fmt: skip
        assert_equal(y, expected)
        assert stats is not None
        mean, rstd = _moments(y, 8, per_frame)
        found = stats.double()
        torch.testing.assert_close(found[..., 0] + found[..., 1], mean, rtol=1e-7, atol=1e-5)
        torch.testing.assert_close(found[..., 2], rstd, rtol=2e-5, atol=0)


UP = {
    "space": (Case((64, 256), (2, 5, 9), (2, 3, 3)), (1, 2, 2), 0),
    "time_too": (Case((64, 512), (3, 4, 6), batch=2), (2, 2, 2), 1),
    "one_slot": (Case((64, 512), (1, 4, 4)), (2, 2, 2), 1),
    "no_whole_kernel_rows": (Case((64, 96), (2, 4, 4)), (1, 2, 2), 0),
}


@pytest.mark.parametrize("name", UP)
def test_depth_to_space_on_the_way(name: str, device: torch.device) -> None:
    case, factor, drop = UP[name]
    inputs = [t.contiguous() for t in _inputs(case, torch.bfloat16, device)]
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last_3d)
    found = []
    for joined in (True, False):
        x, weight, bias = (t.detach().requires_grad_() for t in inputs)
        if joined:
            y = _conv_fused.causal_conv3d_to_space(x, weight, bias, factor=factor, drop_first=drop)
        else:
            deep = mf.causal_conv3d(x, weight, bias, impl="native")
            y = mf.depth_to_space3d(deep, factor, drop_first=drop)
        found.append((y, *torch.autograd.grad(y.float().sin().sum(), (x, weight, bias))))
    for a, b in zip(*found, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_residual_block_is_as_good_as_without(training: bool, device: torch.device) -> None:
    torch.manual_seed(5)
    block = ResBlock3d(64, 64).to(device, torch.bfloat16)
    x = torch.randn(1, 64, 2, 5, 6, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    exact_block = ResBlock3d(64, 64).to(device, torch.float64)
    exact_block.load_state_dict(block.state_dict())

    def results(block: ResBlock3d, x: Tensor, impl: str) -> list[Tensor]:
        x = x.detach().requires_grad_(training)
        with _native.default_impl(impl), torch.set_grad_enabled(training):
            y = block(x)
            if not training:
                return [y]
            leaves = [x, block.conv1.weight, block.norm2.weight]
            return [y, *torch.autograd.grad(y.sin().sum(), leaves)]

    native = results(block, x, "auto")
    plain = results(block, x, "reference")
    exact = results(exact_block, x.double(), "reference")
    for values in zip(native, plain, exact, strict=True):
        assert_within_budget(*values)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    _packed_weights._entries.clear()
    yield
    _packed_weights._entries.clear()


def test_packed_weights_are_kept_and_never_stale(device: torch.device) -> None:
    case = dataclasses.replace(CASES["part_of_a_tile"], channels=(64, 72))
    x, weight, _ = _inputs(case, torch.bfloat16, device)

    def conv(weight: Tensor) -> Tensor:
        return mf.causal_conv3d(x, weight, impl="native")

    first = conv(weight)
    assert _packed_weights.held_bytes(True) == 0
    for _ in range(3):
        assert_equal(conv(weight), first)
        assert _packed_weights.held_bytes(True) >= weight.nbytes
    # one value, behind torch's back, then through an operation that it sees
    weight.data.view(-1)[-1] += 1.0
    changed = conv(weight)
    assert not torch.equal(changed, first)
    assert_equal(changed, conv(weight.clone()))
    weight.mul_(0.5)
    for _ in range(3):
        assert_equal(conv(weight), conv(weight.clone()))
    del weight
    assert _packed_weights.held_bytes(True) == 0


def test_a_training_step_keeps_no_packed_weights(device: torch.device) -> None:
    x, weight, _ = _inputs(CASES["part_of_a_tile"], torch.bfloat16, device)
    weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(3):
        y = mf.causal_conv3d(x.requires_grad_(), weight, impl="native")
        y.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert _packed_weights.held_bytes(True) == 0
