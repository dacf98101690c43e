"""Layers beyond their golden arrays: norms, blocks, the two reference-only ops under them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import magvit_fast as mf
from magvit_fast.models.magvit_v2 import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.nn.norm import AdaptiveGroupNorm, GroupNormSiLU, group_count, upsample_nearest
from magvit_fast.nn.resample import Upsample


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (16, 16), (31, 31), (32, 32), (96, 32)])
def test_group_count(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize("channels", [0, 33, 100])
def test_group_count_refuses(channels: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of it, got {channels}"):
        group_count(channels)


def naive_norm(x: torch.Tensor, groups: int, eps: float, per_frame: bool) -> torch.Tensor:
    b, c, t, h, w = x.shape
    grouped = x.view(b, groups, c // groups, t, h, w)
    axes = (2, 4, 5) if per_frame else (2, 3, 4, 5)
    mean = grouped.mean(axes, keepdim=True)
    var = grouped.var(axes, correction=0, keepdim=True)
    return ((grouped - mean) / (var + eps).sqrt()).view_as(x)


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_group_norm_silu_is_its_definition(
    per_frame: bool, activation: str | None, adaptive: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64) * 3 + 2
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 8, 3, 4, 5, dtype=torch.float64)
    expected = naive_norm(x, 4, 1e-3, per_frame)
    expected = expected * weight.view(8, 1, 1, 1) + bias.view(8, 1, 1, 1)
    if adaptive:
        expected = expected * (1 + scale) + shift
    if activation:
        expected = expected * torch.sigmoid(expected)
    y = mf.group_norm_silu(
        x.contiguous(memory_format=memory_format),
        4,
        weight,
        bias,
        eps=1e-3,
        per_frame=per_frame,
        scale=scale if adaptive else None,
        shift=shift if adaptive else None,
        activation=activation,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_group_norm_keeps_its_digits_at_a_large_mean(
    mean: float, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 32, 2, 16, 16) + mean).contiguous(memory_format=memory_format)
    y = mf.group_norm_silu(x, 8, activation=None)
    exact = naive_norm(x.double().contiguous(), 8, 1e-6, True)
    # 2**-24 * mean is what rounding x itself leaves.
    assert (y - exact).abs().max() < 4e-6 + 2**-23 * mean


def test_group_norm_silu_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.randn(1, 4, 2, 1, 1, dtype=torch.float64, requires_grad=True)

    def op(*inputs: torch.Tensor) -> torch.Tensor:
        x, weight, bias, scale = inputs
        return mf.group_norm_silu(x, 2, weight, bias, eps=1e-2, scale=scale, shift=scale)

    assert torch.autograd.gradcheck(op, (x, weight, bias, scale))
    assert torch.autograd.gradgradcheck(op, (x, weight, bias, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_silu_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 2, 8, 8)
    layer = GroupNormSiLU(32)
    exact = layer(x)
    low = layer(x.to(dtype))
    assert low.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (low.float() - exact).abs().max() < 4 * eps * exact.abs().max()


@pytest.mark.parametrize("shape", [(0, 8, 2, 4, 4), (1, 8, 1, 1, 1)])
def test_group_norm_silu_edge_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = mf.group_norm_silu(x, 4)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_group_norm_silu_refuses() -> None:
    x = torch.zeros(1, 8, 2, 4, 4)
    with pytest.raises(ValueError, match="num_groups: expected a divisor of the 8 channels"):
        mf.group_norm_silu(x, 3)
    with pytest.raises(ValueError, match=r"weight: expected shape \(8,\), got \(4,\)"):
        mf.group_norm_silu(x, 4, torch.ones(4))
    with pytest.raises(ValueError, match="scale: expected a shape broadcastable"):
        mf.group_norm_silu(x, 4, scale=torch.ones(1, 8, 3, 1, 1))
    with pytest.raises(ValueError, match="activation: expected 'silu' or None, got 'relu'"):
        mf.group_norm_silu(x, 4, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: expected 5 dimensions"):
        mf.group_norm_silu(x[0], 4)
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        mf.group_norm_silu(x.long(), 4)


@given(
    factor=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 3),
    frames=st.integers(1, 3),
    drop=st.integers(0, 2),
)
def test_depth_to_space_is_its_index_map(
    factor: tuple[int, int, int], channels: int, frames: int, drop: int
) -> None:
    st_, sh, sw = factor
    drop = min(drop, frames * st_ - 1)
    x = torch.arange(2 * st_ * sh * sw * channels * frames * 6).view(2, -1, frames, 2, 3)
    y = mf.depth_to_space3d(x, factor, drop_first=drop)
    assert y.shape == (2, channels, frames * st_ - drop, 2 * sh, 3 * sw)
    for t in range(y.shape[2]):
        for h in range(2 * sh):
            for w in range(3 * sw):
                (ct, it), (ch, ih), (cw, iw) = (
                    divmod(v, f) for v, f in ((t + drop, st_), (h, sh), (w, sw))
                )
                first = ((it * sh + ih) * sw + iw) * channels
                assert torch.equal(y[:, :, t, h, w], x[:, first : first + channels, ct, ch, cw])
    z = mf.depth_to_space3d(
        x.contiguous(memory_format=torch.channels_last_3d), factor, drop_first=drop
    )
    assert torch.equal(z, y)


def test_depth_to_space_refuses() -> None:
    x = torch.zeros(1, 6, 2, 2, 2)
    with pytest.raises(ValueError, match="channels in a multiple of 8"):
        mf.depth_to_space3d(x, 2)
    with pytest.raises(ValueError, match=r"drop_first: expected 0..2, got 3"):
        mf.depth_to_space3d(x, (1, 1, 1), drop_first=3)
    with pytest.raises(ValueError, match="factor: expected"):
        mf.depth_to_space3d(x, (0, 1, 1))


@given(
    slots=st.integers(1, 4),
    temporal=st.lists(st.booleans(), min_size=0, max_size=3),
)
def test_one_resize_is_many(slots: int, temporal: list[bool]) -> None:
    """Repeating and dropping level by level gives the frames of one repeat and one drop."""
    x = torch.arange(slots * 2).view(1, 1, slots, 1, 2)
    running = x
    for doubled in temporal:
        factor = 2 if doubled else 1
        running = running.repeat_interleave(factor, 2)[:, :, factor - 1 :]
        running = running.repeat_interleave(2, 3).repeat_interleave(2, 4)
    factor3 = (2 ** sum(temporal), 2 ** len(temporal), 2 ** len(temporal))
    assert torch.equal(upsample_nearest(x, factor3, running.shape[2]), running)


def test_adaptive_norm_at_a_finer_grid_equals_the_resized_condition() -> None:
    torch.manual_seed(0)
    layer = AdaptiveGroupNorm(8, 5).double()
    condition = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64).sign()
    x = torch.randn(2, 8, 5, 4, 4, dtype=torch.float64)
    resized = upsample_nearest(condition, (2, 2, 2), 5)
    torch.testing.assert_close(layer(x, condition, (2, 2, 2)), layer(x, resized))


def test_res_block_has_a_shortcut_only_where_the_width_changes() -> None:
    assert ResBlock3d(8, 8, conv_shortcut=True).shortcut is None
    narrow, wide = ResBlock3d(8, 16).shortcut, ResBlock3d(8, 16, conv_shortcut=True).shortcut
    assert narrow is not None
    assert wide is not None
    assert (narrow.kernel_size, wide.kernel_size) == ((1, 1, 1), (3, 3, 3))


def test_res_block_equals_plain_torch() -> None:
    torch.manual_seed(0)
    block = ResBlock3d(4, 8).double()
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64)

    def conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), weight)

    y = conv(F.silu(naive_norm(x, 4, 1e-6, True)), block.conv1.weight)
    y = conv(F.silu(naive_norm(y, 8, 1e-6, True)), block.conv2.weight)
    assert block.shortcut is not None
    torch.testing.assert_close(block(x), y + F.conv3d(x, block.shortcut.weight))


@pytest.mark.parametrize("temporal", [False, True])
def test_upsample_of_one_slot_keeps_the_last_frame(temporal: bool) -> None:
    """A one-frame video stays one frame; of two up-sampled frames index 1 is kept."""
    torch.manual_seed(0)
    layer = Upsample(4, temporal=temporal)
    x = torch.randn(1, 4, 1, 2, 2)
    whole = mf.depth_to_space3d(layer.conv(x), layer.factor)
    assert torch.equal(layer(x), whole[:, :, -1:])


def test_norm_groups_reach_every_norm_of_the_tokenizer() -> None:
    config = MagvitV2Config(
        filters=8,
        channel_multipliers=(1, 2),
        temporal_downsample=(True,),
        num_res_blocks=1,
        num_bits=6,
        norm_groups=4,
    )
    norms = [m for m in MagvitV2Tokenizer(config).modules() if hasattr(m, "num_groups")]
    assert norms
    assert all(m.num_groups == 4 for m in norms)
    with pytest.raises(ValueError, match="channels"):
        replace(config, norm_groups=3)
    with pytest.raises(ValueError, match="groups"):
        replace(config, norm_groups=0)
