"""Norms recomputed in the backward: the same gradients for less memory; levels recomputed whole."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from magvit_fast import _native
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.nn.norm import GroupNormSiLU
from magvit_fast.nn.recompute import checkpointed, norm_then
from magvit_fast.testing.budgets import assert_equal


def _plain(block: ResBlock3d, x: Tensor) -> Tensor:
    y = block.conv2(block.norm2(block.conv1(block.norm1(x))))
    return (x if block.shortcut is None else block.shortcut(x)) + y


def _input(channels: int = 16) -> Tensor:
    x = torch.randn(1, channels, 3, 6, 8).contiguous(memory_format=torch.channels_last_3d)
    return x.requires_grad_()


def _watch(*modules: nn.Module) -> list[weakref.ref[Tensor]]:
    """Fills up with references to the results of these modules that do not keep them alive."""
    seen: list[weakref.ref[Tensor]] = []
    for module in modules:
        module.register_forward_hook(lambda _m, _i, out: seen.append(weakref.ref(out)))
    return seen


@pytest.mark.parametrize("out_channels", [16, 24])
def test_gradients_are_those_of_the_plain_composition(out_channels: int) -> None:
    block, x = ResBlock3d(16, out_channels), _input()
    leaves = [x, *block.parameters()]
    dy = torch.randn(1, out_channels, 3, 6, 8)
    y, plain = block(x), _plain(block, x)
    assert_equal(y, plain)
    expected = torch.autograd.grad(plain, leaves, dy)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert_equal(a, b)


def test_second_derivatives() -> None:
    block, x = ResBlock3d(8, 8), _input(8)
    found = []
    for call in (block, lambda v: _plain(block, v)):
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *block.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_transforms_of_torch_func(impl: _native.Impl) -> None:
    """They have no rule for the kernels' gradients and refuse hooks: the plain reference serves them."""
    block, x = ResBlock3d(8, 8), _input(8)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def value(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    with _native.default_impl(impl):
        dx, rest = torch.func.grad(value, (0, 1))(x.detach(), parameters)
    for a, b in zip([dx, *rest.values()], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_results_of_norms_are_not_kept() -> None:
    block, x = ResBlock3d(8, 8), _input(8)
    for call, kept in ((block, False), (lambda v: _plain(block, v), True)):
        seen = _watch(block.norm1, block.norm2)
        y = call(x)
        assert [r() is not None for r in seen[-2:]] == [kept] * 2
        del y


def test_inference_frees_what_norms_have_read() -> None:
    block, x = ResBlock3d(8, 8), _input(8)
    seen, alive = _watch(block.conv1, block.norm2), []
    block.conv2.register_forward_pre_hook(lambda _m, _i: alive.extend(r() for r in seen))
    with torch.no_grad():
        block(x)
    assert [t is not None for t in alive] == [False, True]


def test_changes_in_place_are_noticed() -> None:
    block, x = ResBlock3d(8, 8), _input(8)
    y = block(x)
    with torch.no_grad():
        block.norm1.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="in place"):
        y.sum().backward()


def test_under_autocast_and_without_gradients() -> None:
    block, x = ResBlock3d(8, 8), _input(8)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = block(x), _plain(block, x)
    assert y.dtype == plain.dtype
    assert_equal(y, plain)
    expected = torch.autograd.grad(plain.sum(), list(block.parameters()))
    for a, b in zip(torch.autograd.grad(y.sum(), list(block.parameters())), expected, strict=True):
        assert_equal(a, b)
    with torch.no_grad():
        assert_equal(block(x), _plain(block, x))


def test_a_recomputed_level_keeps_its_input_alone() -> None:
    blocks, x = nn.Sequential(*(ResBlock3d(8, 8) for _ in range(3))), _input(8)
    leaves = [x, *blocks.parameters()]
    expected = torch.autograd.grad(blocks(x).sum(), leaves)
    seen = _watch(blocks[0], blocks[1].conv1)
    y = checkpointed(blocks, x)
    assert [r() for r in seen] == [None, None]
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert_equal(a, b)


def test_compiles_whole() -> None:
    block, x = ResBlock3d(8, 8), _input(8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_norm_then_takes_any_layer() -> None:
    norm, x = GroupNormSiLU(8), _input(8)
    y = norm_then(norm, lambda v, factor: v * factor, x, 3.0)
    assert_equal(y, norm(x) * 3.0)
