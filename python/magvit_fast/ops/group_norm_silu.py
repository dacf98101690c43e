"""group_norm_silu: group normalization, affine or adaptive, and SiLU in one op.

Next hop: `_core.group_norm_silu_{forward,backward}`, or the same names of `_core_cuda`
(csrc/group_norm_silu).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks, _norm_checks
from magvit_fast.ops._layout import address, channels_last, empty_in_format, is_channels_last

# --- contract ---------------------------------------------------------------------------------
# x [B, C, T, H, W]; the C channels form `num_groups` groups of neighbors. Statistics (biased
# variance, eps under the root) run over (C / num_groups, H, W) of one frame when `per_frame`, else
# over (C / num_groups, T, H, W). Per frame is what keeps MAGVIT-v2 causal; MAGVIT v1 spans time.
#     y = activation((x - mean) / sqrt(var + eps) * weight + bias)
# `weight`, `bias` [C]. The adaptive form multiplies and adds per position after that:
#     y = activation(norm(x) * (1 + scale) + shift)
# scale and shift [B or 1, C or 1, T' or 1, H' or 1, W' or 1], the axes before x's missing or not, are
# repeated to x's shape: an axis of 1 as in broadcasting, and T' H' W' by `factor` (f_t, f_h, f_w),
# nearest, of which the first T' f_t - T frames are dropped (what causal up-samplers do).
# Kept for the backward: x and, in float32, mean and 1 / std of each group; the rest is computed
# again. Twice differentiable; results do not depend on the number of threads.
# Source: MAGVIT-v2, appendix architecture figure; "GroupNormSpatial" and "CondNorm" of Google's port.


class Settings(NamedTuple):
    """The numbers of both native ops, in the order of their schemas."""

    factor: list[int]
    num_groups: int
    per_frame: bool
    silu: bool


# --- reference --------------------------------------------------------------------------------
def _centered(x: Tensor, num_groups: int) -> Tensor:
    """x [N, C, ...] less the mean of its group.

    PyTorch's channels-last kernel takes the variance as E[x^2] - E[x]^2, which loses digits when
    the mean is not small: 4e-5 in float32 at a mean of five deviations. Group norm does not change
    under a shift of its group, so that the mean may be removed first and without a gradient.
    """
    n, channels = x.shape[:2]
    size = channels // num_groups
    mean = x.detach().flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = mean.view(n, num_groups, size).mean(2, keepdim=True)
    mean = mean.expand(n, num_groups, size).reshape(n, channels)
    return x - mean.to(x.dtype).view(n, channels, *[1] * (x.dim() - 2))


def _repeated(value: Tensor, x: Tensor, factor: Sequence[int]) -> Tensor:
    """scale or shift, 5-D, repeated by `factor` along its axes that are not broadcast."""
    for axis in (2, 3, 4):
        if factor[axis - 2] > 1 and value.shape[axis] > 1:
            value = value.repeat_interleave(factor[axis - 2], axis)
    return value[:, :, -x.shape[2] :]


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    settings: Settings,
) -> Tensor:
    """Plain torch, any floating dtype, differentiable any number of times."""
    weight, bias, scale, shift = (
        None if v is None else v.to(x.dtype) for v in (weight, bias, scale, shift)
    )
    # A channel stride of one is the channels-last order even where frames were cut off in front.
    layout = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    groups = settings.num_groups
    if settings.per_frame:
        b, _, t = x.shape[:3]
        # [B*T, C, H, W]: a view for channels-last input; PyTorch's channels-last kernel runs then.
        # (torch.group_norm, because F.group_norm refuses a single value per channel.)
        frames = x.transpose(1, 2).flatten(0, 1)
        y = torch.group_norm(_centered(frames, groups), groups, weight, bias, eps)
        y = y.view(b, t, *y.shape[1:]).transpose(1, 2)
    else:
        y = torch.group_norm(_centered(x, groups), groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _repeated(scale, x, settings.factor))
    if shift is not None:
        y = y + _repeated(shift, x, settings.factor)
    y = F.silu(y) if settings.silu else y
    return y.contiguous(memory_format=layout)


# --- schema and fake --------------------------------------------------------------------------
_OPERANDS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift"
_SETTINGS = "int[] factor, int num_groups, bool per_frame, bool silu"
_TAGS = (torch.Tag.needs_exact_strides,)  # the memory format of x decides that of the result
_native.LIB.define(
    f"group_norm_silu({_OPERANDS}, float eps, {_SETTINGS}) -> (Tensor, Tensor)", tags=_TAGS
)
_native.LIB.define(
    f"group_norm_silu_apply({_OPERANDS}, Tensor stats, {_SETTINGS}) -> Tensor", tags=_TAGS
)
_native.LIB.define(
    f"group_norm_silu_backward(Tensor dy, Tensor stats, {_OPERANDS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _like(x: Tensor) -> Tensor:
    """Room for a result: dense, in x's memory format."""
    return empty_in_format(x, x.shape, is_channels_last(x))


def _empty_map(x: Tensor, value: Tensor | None) -> Tensor:
    """Room for the gradient of scale or shift, in its memory format."""
    if value is None:
        return x.new_empty((0,))
    return empty_in_format(x, value.shape, is_channels_last(value))


def empty_statistics(x: Tensor, num_groups: int, per_frame: bool) -> Tensor:
    """Room for mean (as a sum of two floats) and 1 / std of each group of a frame, else of a clip."""
    spans = x.shape[0] * (x.shape[2] if per_frame else 1)
    return x.new_empty((spans, num_groups, 3), dtype=torch.float32)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = Settings(*settings)
    return _like(x), empty_statistics(x, how.num_groups, how.per_frame)


torch.library.register_fake("magvit_fast::group_norm_silu", _fake, lib=_native.LIB)


def _fake_apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, stats: Tensor, *settings: Any,
) -> Tensor:  # fmt: skip
    return _like(x)


torch.library.register_fake("magvit_fast::group_norm_silu_apply", _fake_apply, lib=_native.LIB)


def _fake_backward(
    dy: Tensor, stats: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    by_channel = [x.new_empty((x.shape[1],), dtype=torch.float32) for _ in range(2)]
    return _like(x), *by_channel, _empty_map(x, scale), _empty_map(x, shift)


torch.library.register_fake(
    "magvit_fast::group_norm_silu_backward", _fake_backward, lib=_native.LIB
)


# --- launch -----------------------------------------------------------------------------------
def _cells(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, factor: Sequence[int]
) -> list[int]:
    """Positions that share a value of scale and of shift, along t, h and w."""
    maps = [v for v in (scale, shift) if v is not None]
    return [
        factor[a] if any(v.shape[2 + a] > 1 for v in maps) else max(x.shape[2 + a], 1)
        for a in range(3)
    ]


def _skipped(x: Tensor, cell: int) -> int:
    return -x.shape[2] % cell


def _dense_map(value: Tensor | None, x: Tensor) -> Tensor | None:
    """scale or shift in x's dtype with adjacent channels, as the kernels read it."""
    if value is None:
        return None
    value = value.to(x.dtype).expand(-1, x.shape[1], -1, -1, -1)
    return value if value.stride(1) == 1 else channels_last(value)


def _numbers(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, cell: Sequence[int], settings: Settings, planes: bool,
) -> list[int]:  # fmt: skip
    """What csrc/group_norm_silu/bindings.cpp reads into a GroupNormSiluInput, in its order."""
    b, c, t, h, w = x.shape
    strides = []
    for value in (scale, shift):
        for axis in (0, 2, 3, 4):
            repeats = value is None or value.shape[axis] == 1
            strides.append(0 if repeats or value is None else value.stride(axis))
    return [
        *(address(v) for v in (x, weight, bias, scale, shift)),
        b, t, h, w, c, settings.num_groups, *cell, _skipped(x, cell[0]), *strides,
        settings.per_frame, settings.silu, planes, _native.dtype_code(x.dtype),
    ]  # fmt: skip


def _takes_planes(x: Tensor, core: Any, *maps: Tensor | None) -> bool:
    """Whether a kernel reads x as it lies, channels-first; else x goes in and out channels-last."""
    adaptive = any(v is not None for v in maps)
    return not is_channels_last(x) and bool(core.group_norm_silu_takes_planes(adaptive))


def _dense(x: Tensor, planes: bool) -> Tensor:
    return x.contiguous() if planes else channels_last(x)


def _in_float32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()


class _Call(NamedTuple):
    """What both directions hand to the core, and the tensors behind its addresses."""

    numbers: list[int]
    cell: list[int]
    space: Tensor
    operands: tuple[Tensor | None, ...]


def _prepare(
    source: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, how: Settings, planes: bool,
) -> _Call:  # fmt: skip
    cell = _cells(source, scale, shift, how.factor)
    operands = (
        source, _in_float32(weight), _in_float32(bias), _dense_map(scale, source),
        _dense_map(shift, source),
    )  # fmt: skip
    numbers = _numbers(*operands, cell, how, planes)
    core, *where = _native.launcher(source.device)
    size = core.group_norm_silu_workspace_bytes(numbers, *where)
    space = torch.empty(size, dtype=torch.uint8, device=source.device)
    return _Call(numbers, cell, space, operands)


def _in_format_of(x: Tensor, result: Tensor, planes: bool) -> Tensor:
    return result if planes or is_channels_last(x) else _like(x).copy_(result)


def _launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = Settings(*settings)
    stats = empty_statistics(x, how.num_groups, how.per_frame)
    return _run_forward(x, weight, bias, scale, shift, eps, how, stats, False), stats


def _launch_apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, stats: Tensor, *settings: Any,
) -> Tensor:  # fmt: skip
    ready = stats.contiguous()
    return _run_forward(x, weight, bias, scale, shift, 0.0, Settings(*settings), ready, True)


def _run_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float, how: Settings, stats: Tensor, ready: bool,
) -> Tensor:  # fmt: skip
    core, *where = _native.launcher(x.device)
    planes = _takes_planes(x, core, scale, shift)
    source = _dense(x, planes)
    y = _native.in_huge_pages(torch.empty_like(source))
    _native.trace("group_norm_silu", x=tuple(x.shape), dtype=x.dtype, device=x.device, settings=how)
    if x.numel():
        call = _prepare(source, weight, bias, scale, shift, how, planes)
        core.group_norm_silu_forward(
            call.numbers, eps, y.data_ptr(), stats.data_ptr(), call.space.data_ptr(), ready, *where
        )
        _native.finish(x.device)
    return _in_format_of(x, y, planes)


def statistics_of(x: Tensor, num_groups: int, per_frame: bool, eps: float) -> Tensor:
    """What group_norm_silu takes as `statistics` of x, for a launch that has none of its own."""
    stats = empty_statistics(x, num_groups, per_frame)
    if x.numel():
        core, *where = _native.launcher(x.device)
        planes = _takes_planes(x, core)
        how = Settings([1, 1, 1], num_groups, per_frame, False)
        call = _prepare(_dense(x, planes), None, None, None, None, how, planes)
        core.group_norm_silu_forward(
            call.numbers, eps, 0, stats.data_ptr(), call.space.data_ptr(), False, *where
        )
        _native.finish(x.device)
    return stats


def _launch_backward(
    dy: Tensor, stats: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    how = Settings(*settings)
    core, *where = _native.launcher(x.device)
    planes = _takes_planes(x, core, scale, shift)
    source, upstream = _dense(x, planes), _dense(dy.to(x.dtype), planes)
    ready = stats.contiguous()
    dx = _native.in_huge_pages(torch.empty_like(source))
    dweight, dbias = x.new_zeros((2, x.shape[1]), dtype=torch.float32).unbind()
    maps = [_empty_map(x, v) for v in (scale, shift)]
    _native.trace("group_norm_silu_backward", x=tuple(x.shape), dtype=x.dtype, device=x.device,
                  settings=how)  # fmt: skip
    if x.numel():
        call = _prepare(source, weight, bias, scale, shift, how, planes)
        b, c, t, h, w = x.shape
        cell = call.cell
        adaptive = scale is not None or shift is not None
        size = (b, t, -(-h // cell[1]), -(-w // cell[2]), c) if adaptive else (0,)
        by_cell = [x.new_empty(size, dtype=torch.float32) for _ in maps]
        core.group_norm_silu_backward(
            call.numbers, upstream.data_ptr(), ready.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
            dbias.data_ptr(), by_cell[0].data_ptr(), by_cell[1].data_ptr(), call.space.data_ptr(),
            *where,
        )  # fmt: skip
        _native.finish(x.device)
        for i, value in enumerate((scale, shift)):
            if value is not None:
                maps[i] = _sum_to_map(by_cell[i], maps[i], cell[0], _skipped(x, cell[0]))
    else:
        maps = [m.zero_() for m in maps]
    # clones: results of an op may not share memory
    return _in_format_of(x, dx, planes), dweight.clone(), dbias.clone(), *maps


def _sum_to_map(by_cell: Tensor, result: Tensor, cell: int, skipped: int) -> Tensor:
    """Sums by frame and cell [B, T, cells of h, cells of w, C] in the form of `result`: there, or as they lie."""
    b, t, h, w, c = by_cell.shape
    if cell > 1:
        first = cell - skipped  # frames of the first cell that exist
        head = by_cell[:, :first].sum(1, keepdim=True)
        tail = by_cell[:, first:].view(b, (t - first) // cell, cell, h, w, c).sum(2)
        by_cell = torch.cat([head, tail], 1)
    total = by_cell.permute(0, 4, 1, 2, 3).sum_to_size(result.shape).to(result.dtype)
    return total if total.stride() == result.stride() else result.copy_(total)


for _device in ("CPU", "CUDA"):
    _native.LIB.impl("group_norm_silu", _launch, _device)
    _native.LIB.impl("group_norm_silu_apply", _launch_apply, _device)
    _native.LIB.impl("group_norm_silu_backward", _launch_backward, _device)
_OP = torch.ops.magvit_fast.group_norm_silu.default
_APPLY = torch.ops.magvit_fast.group_norm_silu_apply.default
_BACKWARD = torch.ops.magvit_fast.group_norm_silu_backward.default


# --- autograd ---------------------------------------------------------------------------------
class _GroupNormSiLU(torch.autograd.Function):
    """Saves x and the statistics; a gradient that will itself be differentiated comes from the
    reference, in plain torch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, eps: float, settings: Settings, stats: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if stats is None:
            y, stats = _OP(x, weight, bias, scale, shift, eps, *settings)
        else:
            y = _APPLY(x, weight, bias, scale, shift, stats, *settings)
        ctx.save_for_backward(stats, x, weight, bias, scale, shift)
        ctx.eps, ctx.settings = eps, settings
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stats, *operands = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        # torch.compile traces this with gradients on and cannot differentiate twice anyway.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_grads(operands, needed, grads[0], ctx), None, None, None
        found = _BACKWARD(grads[0], stats, *operands, *ctx.settings)
        results = [
            g.to(v.dtype) if v is not None and need else None
            for g, v, need in zip(found, operands, needed, strict=True)
        ]
        return *results, None, None, None


def _differentiable_grads(
    operands: Sequence[Any], needed: Sequence[bool], dy: Tensor, ctx: Any
) -> list[Tensor | None]:
    # Views: an operand may be made of another or be the same tensor, and its gradient is that of its
    # own place alone; autograd adds up the rest.
    views: list[Any] = [None if v is None else v.view_as(v) for v in operands]
    x, weight, bias, scale, shift = views
    y = reference(x, weight, bias, scale, shift, ctx.eps, ctx.settings)
    wanted = [v for v, need in zip(views, needed, strict=True) if v is not None and need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [
        next(found) if v is not None and need else None
        for v, need in zip(views, needed, strict=True)
    ]


# --- public -----------------------------------------------------------------------------------
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    per_frame: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    factor: int | tuple[int, int, int] = 1,
    activation: Literal["silu"] | None = "silu",
    statistics: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Group norm (per frame or clip-wide), affine and adaptive terms, then SiLU.

    Args:
        x: [B, C, T, H, W]; any floating dtype, any strides. channels_last_3d is the fast layout.
        num_groups: a divisor of C.
        weight, bias: [C] or None, any floating dtype.
        eps: added to the variance.
        per_frame: statistics of each frame (causal), else of the whole clip.
        scale, shift: y = act(norm * (1 + scale) + shift); broadcastable to x, or, with `factor`, on
            a grid that is coarser than x's by (f_t, f_h, f_w): each value then serves a block of
            positions, and the first block lacks its leading frames where T is no multiple of f_t.
            They are never written out at x's size.
        activation: "silu" or None.
        statistics: those of x where whoever made x has left them (ops/_conv_fused.py): [B * T, or B for
            the whole clip, num_groups, 3] in float32, mean as a sum of two floats and 1 / sqrt(var +
            eps). A kernel then reads x once. Gradients are those of statistics made here.
        impl: "auto", "native" or "reference".

    Returns:
        A tensor of x's shape, dtype and memory format. Twice differentiable. The backward keeps x
        and the statistics and computes norm and SiLU again.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737), appendix architecture figure.
    """
    _checks.check_tensor("x", x, ndim=5, floating=True)
    eps = _checks.check_number("eps", eps, least=0.0)
    factors = list(_checks.triple("factor", factor))
    adaptive = {"scale": scale, "shift": shift}
    _norm_checks.check(
        x, num_groups, {"weight": weight, "bias": bias}, adaptive, factors, activation
    )
    _norm_checks.check_statistics(statistics, x, num_groups, per_frame)
    scale, shift = (
        None if v is None else v.reshape((1,) * (5 - v.dim()) + v.shape) for v in (scale, shift)
    )
    settings = Settings(factors, num_groups, per_frame, activation == "silu")
    obstacle = _native.native_dtype_obstacle(x.dtype) or _native.missing_core(x.device)
    if _native.use_native("group_norm_silu", impl, obstacle):
        return _GroupNormSiLU.apply(  # type: ignore[no-untyped-call, no-any-return]
            x, weight, bias, scale, shift, eps, settings, statistics
        )
    return reference(x, weight, bias, scale, shift, eps, settings)
