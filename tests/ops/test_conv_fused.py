"""causal_conv3d joined with what follows it: contracts, gradients and compilation, on any core.

What a CUDA kernel makes of it is held in tests/cuda/test_conv_fused.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.nn.blocks import ResBlock3d, run_blocks
from magvit_fast.nn.norm import FollowingNorm, GroupNormSiLU
from magvit_fast.nn.resample import Upsample
from magvit_fast.ops import _conv_fused
from magvit_fast.testing.budgets import assert_equal

GEOMETRY = ([1, 1, 1], [1, 1, 1], 1, [2, 0, 1, 1, 1, 1], "zeros", "zeros")
LAYOUTS = [torch.channels_last_3d, torch.contiguous_format]


@pytest.fixture
def _joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "joins_passes", lambda device: True)


def _inputs(c_out: int, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 8, 3, 4, 6).contiguous(memory_format=layout)
    return x, torch.randn(c_out, 8, 3, 3, 3) / 10, torch.randn(c_out)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(layout: torch.memory_format) -> None:
    ops = torch.ops.magvit_fast
    for batch in (2, 0):
        x, weight, bias = _inputs(16, layout)
        x = x[:batch]
        torch.library.opcheck(
            ops.causal_conv3d_statistics.default,
            (x, None, weight, bias, None, 4, True, 1e-6, *GEOMETRY),
        )
        torch.library.opcheck(
            ops.causal_conv3d_to_space.default, (x, None, weight, bias, [2, 2, 2], 1, *GEOMETRY)
        )
    y = mf.causal_conv3d(*_inputs(16, layout))
    stats = torch.rand(2 * 3, 4, 3)
    torch.library.opcheck(
        ops.group_norm_silu_apply.default,
        (y, torch.randn(16), None, None, None, stats, [1, 1, 1], 4, True, True),
    )


@pytest.mark.usefixtures("_joined")
@pytest.mark.parametrize("per_frame", [True, False])
def test_statistics_replace_those_of_the_norm(per_frame: bool) -> None:
    x, weight, bias = _inputs(16, torch.channels_last_3d)
    y, stats = _conv_fused.causal_conv3d_statistics(
        x, weight, bias, num_groups=4, per_frame=per_frame, eps=1e-6
    )
    assert stats is not None
    assert_equal(y, mf.causal_conv3d(x, weight, bias, impl="native"))
    joined, apart = (
        mf.group_norm_silu(y, 4, per_frame=per_frame, statistics=s, impl="native")
        for s in (stats, None)
    )
    assert_equal(joined, apart)


def test_nothing_is_joined_where_nothing_is_gained() -> None:
    x, weight, bias = _inputs(16, torch.channels_last_3d)
    _, stats = _conv_fused.causal_conv3d_statistics(
        x, weight, bias, num_groups=4, per_frame=True, eps=1e-6
    )
    assert stats is None


def _chain() -> tuple[torch.nn.ModuleList, GroupNormSiLU]:
    torch.manual_seed(3)
    norm = GroupNormSiLU(16)
    return torch.nn.ModuleList([ResBlock3d(8, 16), ResBlock3d(16, 16), Upsample(16, temporal=True)]), norm  # fmt: skip


def _results(x: Tensor) -> list[Tensor]:
    layers, norm = _chain()
    x = x.detach().requires_grad_()
    following = FollowingNorm(norm)
    y = run_blocks(layers[:2], x, None, following)
    y = layers[2](norm(y, following.statistics))
    parameters = [p for p in (*layers.parameters(), *norm.parameters()) if p.requires_grad]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layers_give_the_same_joined_and_apart(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 8, 3, 4, 6).contiguous(memory_format=layout)
    apart = _results(x)
    monkeypatch.setattr(_native, "joins_passes", lambda device: True)
    for a, b in zip(_results(x), apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_joined")
def test_second_derivatives() -> None:
    x, weight, bias = _inputs(16, torch.channels_last_3d)

    def penalty(joined: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        if joined:
            y, _ = _conv_fused.causal_conv3d_statistics(
                leaves[0], leaves[1], bias, num_groups=4, per_frame=True, eps=1e-6
            )
            z = _conv_fused.causal_conv3d_to_space(*leaves, bias, factor=(1, 2, 2), drop_first=0)
        else:
            y = mf.causal_conv3d(leaves[0], leaves[1], bias)
            z = mf.depth_to_space3d(mf.causal_conv3d(*leaves, bias), (1, 2, 2))
        (dx,) = torch.autograd.grad(y.sin().sum() + z.cos().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    for a, b in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_joined")
def test_layers_compile_whole() -> None:
    layers, _ = _chain()

    def f(x: Tensor) -> Tensor:
        y: Tensor = layers[2](run_blocks(layers[:2], x, None))
        return y

    torch._dynamo.reset()
    x = torch.randn(1, 8, 3, 4, 6).contiguous(memory_format=torch.channels_last_3d)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected, actual = f(leaves[0]), compiled(leaves[1])
    assert_equal(actual, expected)
    grads = [torch.autograd.grad(y.sum(), leaf)[0]
             for y, leaf in zip((expected, actual), leaves, strict=True)]  # fmt: skip
    torch.testing.assert_close(grads[1], grads[0])


def test_bad_statistics() -> None:
    x = torch.randn(2, 8, 3, 4, 6)
    with pytest.raises(ValueError, match=r"statistics: expected float32 of shape \(6, 2, 3\)"):
        mf.group_norm_silu(x, 2, statistics=torch.randn(2, 2, 3))
