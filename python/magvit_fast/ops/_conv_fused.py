"""causal_conv3d together with what follows it: the statistics of a group norm, or depth to space.

Next hop: `_core_cuda.causal_conv3d_forward_fused` where a kernel makes them of its result before it
leaves the chip; else the convolution's own kernel and then the other op's. For the layers of nn.

    causal_conv3d_statistics  y, and of each group of a frame (or clip) of y, rounded as it is: mean as a
                              sum of two floats, 1 / sqrt(var + eps); group_norm_silu takes them
    causal_conv3d_to_space    depth_to_space3d(y); y itself is never written

Gradients are those of the two ops: statistics count as a function of y, whose gradient is part of
group_norm_silu's, so they carry none of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops._layout import address, empty_in_format, is_channels_last
from magvit_fast.ops.causal_conv3d import (
    _GEOMETRY,
    _TAGS,
    Geometry,
    PadMode,
    _in_layout,
    _launch_forward,
    _out_shape,
    _shape_numbers,
    forward_grads,
    operands,
    prepare,
    run,
)  # fmt: skip
from magvit_fast.ops.depth_to_space3d import _launch as _launch_to_space
from magvit_fast.ops.depth_to_space3d import _SpaceToDepth, depth_to_space3d
from magvit_fast.ops.group_norm_silu import empty_statistics, statistics_of

_NO_FACTOR = (1, 1, 1)

# --- schema and fake --------------------------------------------------------------------------
_native.LIB.define(
    "causal_conv3d_statistics(Tensor x, Tensor? history, Tensor weight, Tensor? bias, "
    f"Tensor? residual, int num_groups, bool per_frame, float eps, {_GEOMETRY}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_native.LIB.define(
    "causal_conv3d_to_space(Tensor x, Tensor? history, Tensor weight, Tensor? bias, int[] factor, "
    f"SymInt drop_first, {_GEOMETRY}) -> Tensor",
    tags=_TAGS,
)


def _fake_statistics(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, num_groups: int, per_frame: bool, eps: float, *geometry: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = empty_in_format(x, _out_shape(x, weight, Geometry(*geometry)), is_channels_last(x))
    return y, empty_statistics(y, num_groups, per_frame)


def _wide_size(deep: Sequence[int], factor: Sequence[int], drop_first: int) -> list[int]:
    b, c, t, h, w = deep
    ft, fh, fw = factor
    return [b, c // (ft * fh * fw), t * ft - drop_first, h * fh, w * fw]


def _fake_to_space(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None, factor: Sequence[int],
    drop_first: int, *geometry: Any,
) -> Tensor:  # fmt: skip
    deep = _out_shape(x, weight, Geometry(*geometry))
    return empty_in_format(x, _wide_size(deep, factor, drop_first), is_channels_last(x))


torch.library.register_fake(
    "magvit_fast::causal_conv3d_statistics", _fake_statistics, lib=_native.LIB
)
torch.library.register_fake("magvit_fast::causal_conv3d_to_space", _fake_to_space, lib=_native.LIB)


# --- launch -----------------------------------------------------------------------------------
def _fused(
    y: Tensor, stats: Tensor | None, eps: float, epilogue: list[int], size: Sequence[int],
    geometry: Geometry, x: Tensor, history: Tensor | None, weight: Tensor, *added: Tensor | None,
) -> bool:  # fmt: skip
    """Write y (channels-last) and the statistics with one kernel; False: there is none for it."""
    core, where, how = _native.launcher(x.device)
    if not hasattr(core, "causal_conv3d_forward_fused") or not y.numel():
        return False
    frames = 0 if history is None else history.shape[2]
    numbers = _shape_numbers(x.shape, frames, size, weight.shape[2:], x.dtype, geometry)
    if not core.causal_conv3d_fuses(numbers, epilogue, where, how):
        return False
    bias, residual = added
    tensors, numbers = operands(x, history, weight, bias, residual, size, geometry)
    if any(t is not None and t.data_ptr() % 16 for t in (*tensors, y)):
        return False
    _native.trace("causal_conv3d_forward_fused", x=tuple(x.shape), weight=tuple(weight.shape),
                  dtype=x.dtype, device=x.device, epilogue=epilogue)  # fmt: skip
    room = core.causal_conv3d_forward_fused_workspace(numbers, epilogue, where, how)
    space = _native.workspace(room, x.device)
    core.causal_conv3d_forward_fused(
        *(address(t) for t in (*tensors, y, stats)), space.data_ptr(), eps, numbers, epilogue,
        where, how,
    )  # fmt: skip
    _native.finish(x.device)
    return True


def _launch_statistics(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, num_groups: int, per_frame: bool, eps: float, *geometry: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = Geometry(*geometry)
    size = _out_shape(x, weight, how)
    y = empty_in_format(x, size, True)
    stats = empty_statistics(y, num_groups, per_frame)
    epilogue = [num_groups, per_frame, *_NO_FACTOR, 0]
    tensors = (x, history, weight, bias, residual)
    if _fused(y, stats, eps, epilogue, size, how, *tensors):
        return _in_layout(y, is_channels_last(x)), stats
    y = _launch_forward(*tensors, *geometry)
    return y, statistics_of(y, num_groups, per_frame, eps)


def _launch_to_depth_space(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None, factor: Sequence[int],
    drop_first: int, *geometry: Any,
) -> Tensor:  # fmt: skip
    how = Geometry(*geometry)
    size = _out_shape(x, weight, how)
    y = empty_in_format(x, _wide_size(size, factor, drop_first), True)
    epilogue = [0, 0, *factor, drop_first]
    if _fused(y, None, 0.0, epilogue, size, how, x, history, weight, bias, None):
        return _in_layout(y, is_channels_last(x))
    return _launch_to_space(
        _launch_forward(x, history, weight, bias, None, *geometry), factor, drop_first
    )


for _device in ("CPU", "CUDA"):
    _native.LIB.impl("causal_conv3d_statistics", _launch_statistics, _device)
    _native.LIB.impl("causal_conv3d_to_space", _launch_to_depth_space, _device)
_STATISTICS = torch.ops.magvit_fast.causal_conv3d_statistics.default
_TO_SPACE = torch.ops.magvit_fast.causal_conv3d_to_space.default


# --- autograd ---------------------------------------------------------------------------------
class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
        residual: Tensor | None, geometry: Geometry, norm: tuple[int, bool, float],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, stats = _STATISTICS(x, history, weight, bias, residual, *norm, *geometry)
        ctx.save_for_backward(x, history, weight)
        ctx.geometry = geometry
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *forward_grads(ctx, grads[0]), None, None


class _ToSpace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
        residual: None, geometry: Geometry, factor: list[int], drop_first: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, history, weight)
        ctx.geometry, ctx.how = geometry, (factor, drop_first)
        return _TO_SPACE(x, history, weight, bias, factor, drop_first, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = _SpaceToDepth.apply(grads[0], *ctx.how)  # type: ignore[no-untyped-call]
        return *forward_grads(ctx, dy), None, None, None


# --- for nn -----------------------------------------------------------------------------------
def joins_passes(x: Tensor) -> bool:
    """Whether there is anything to gain on x's device."""
    return _native.joins_passes(x.device)


def causal_conv3d_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_groups: int, per_frame: bool,
    eps: float, stride: int | Sequence[int] = 1, padding: Sequence[int] | None = None,
    time_mode: PadMode = "zeros", space_mode: PadMode = "zeros", history: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """causal_conv3d, and where that saves a pass the statistics of its result for group_norm_silu.

    Args:
        num_groups, per_frame, eps: of the group norm that reads the result.
        others: as of causal_conv3d.

    Returns:
        y [B, C_out, T', H', W'], and [B * T' (else B), num_groups, 3] in float32 or None.
    """
    call = prepare(
        x, weight, bias, stride, 1, 1, padding, time_mode, space_mode, history, residual, "auto"
    )
    if not (call.native and _native.joins_passes(call.x.device)):
        return run(call), None
    norm = (num_groups, per_frame, eps)
    if torch.is_grad_enabled():
        return _Statistics.apply(*call[:-1], norm)  # type: ignore[no-untyped-call, no-any-return]
    *tensors, geometry, _ = call
    return _STATISTICS(*tensors, *norm, *geometry)  # type: ignore[no-any-return]


def causal_conv3d_to_space(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, factor: Sequence[int],
    drop_first: int, stride: int | Sequence[int] = 1, padding: Sequence[int] | None = None,
    time_mode: PadMode = "zeros", space_mode: PadMode = "zeros", history: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """depth_to_space3d(causal_conv3d(...), factor, drop_first=drop_first).

    Args:
        factor, drop_first: as of depth_to_space3d.
        others: as of causal_conv3d.
    """
    call = prepare(
        x, weight, bias, stride, 1, 1, padding, time_mode, space_mode, history, None, "auto"
    )
    if not (call.native and _native.joins_passes(call.x.device)):
        st, sh, sw = factor
        return depth_to_space3d(run(call), (st, sh, sw), drop_first=drop_first)
    how = (list(factor), drop_first)
    if torch.is_grad_enabled():
        return _ToSpace.apply(*call[:-1], *how)  # type: ignore[no-untyped-call, no-any-return]
    return _TO_SPACE(*call[:4], *how, *call.geometry)  # type: ignore[no-any-return]
