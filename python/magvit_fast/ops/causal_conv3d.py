"""causal_conv3d: 3D convolution with one-sided time padding, three padding modes and history.

Next hop: `_core.causal_conv3d_{forward,input_grad,weight_grad}`, or the same names of `_core_cuda`
(csrc/causal_conv3d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks, _conv_checks, _packed_weights, _precision
from magvit_fast.ops._conv_choice import torch_is_faster
from magvit_fast.ops._layout import address, channels_last, empty_in_format, is_channels_last

# --- contract ---------------------------------------------------------------------------------
# x [B, C_in, T, H, W], weight [C_out, C_in / groups, KT, KH, KW] -> y [B, C_out, T', H', W'].
# On every axis: y_o = sum over taps k of weight_k * padded_(o * stride + k * dilation), where padded
# is `before` values, the axis itself and `after` values. Time is padded by time_mode, height and width
# by space_mode. `history` holds the frames before x: its last `front` frames take the place of front
# padding, and what they leave is padded by time_mode as if history and x were one clip:
#
#   KT = 3, front = 2:      . . x0 x1 x2 x3        no history: two padding frames
#                           . h0 x0 x1 x2 x3       one frame of history, one padding frame
#                           h0 h1 x0 x1 x2 x3      two frames: y continues the earlier clip exactly
#
# `residual` is added to y before it is rounded: the sum of a residual block without a pass of its own.
#
# Three ops, each linear in both of its tensors, each other's gradients: forward (x, w) -> y,
# input_grad (dy, w) -> (dx, dhistory), weight_grad (x, dy) -> dw. So every order of derivative exists.
# Results do not depend on the number of threads. On the CPU, 3x3 planes at stride 1 go by Winograd's
# algorithm (F(4x4) over the plane, F(4) over time) where that pays; _precision.py has the switch.

PadMode = Literal["zeros", "replicate", "reflect"]
PAD_MODES = ("zeros", "replicate", "reflect")


class Geometry(NamedTuple):
    """How outputs meet inputs; the last arguments of all three ops."""

    stride: list[int]
    dilation: list[int]
    groups: int
    padding: list[int]  # front, back, top, bottom, left, right
    time_mode: str
    space_mode: str

    def out_size(self, axis: int, source: int, kernel: int) -> int:
        """Outputs along an axis of `source` elements (time: history and x together)."""
        padded = source + self.padding[2 * axis] + self.padding[2 * axis + 1]
        return (padded - self.dilation[axis] * (kernel - 1) - 1) // self.stride[axis] + 1


def resolve_padding(
    kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int] | None
) -> list[int]:
    """Six ints; None means causal in time and "same" in space, the smaller half first."""
    if padding is not None:
        return [int(p) for p in padding]
    time, height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return [time, 0, height // 2, height - height // 2, width // 2, width - width // 2]


# --- reference --------------------------------------------------------------------------------
def _pad(x: Tensor, pads: Sequence[int], mode: str) -> Tensor:
    if not any(pads):
        return x
    return F.pad(x, list(pads), mode="constant" if mode == "zeros" else mode)


def reference(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, geometry: Geometry,
) -> Tensor:  # fmt: skip
    """Plain torch, any floating dtype, differentiable; `history` already cut to its used frames."""
    front, back, top, bottom, left, right = geometry.padding
    if history is not None:
        x = torch.cat([history, x], dim=2)
        front -= history.shape[2]
    x = _pad(x, (0, 0, 0, 0, front, back), geometry.time_mode)
    conv_padding = [0, 0, 0]
    if geometry.space_mode == "zeros" and top == bottom and left == right:
        conv_padding = [0, top, left]
    else:
        x = _pad(x, (left, right, top, bottom, 0, 0), geometry.space_mode)
    y = F.conv3d(x, weight, bias, geometry.stride, conv_padding, geometry.dilation, geometry.groups)
    return y if residual is None else y + residual


# --- schema and fake --------------------------------------------------------------------------
_GEOMETRY = "int[] stride, int[] dilation, int groups, int[] padding, str time_mode, str space_mode"
_TAGS = (torch.Tag.needs_exact_strides,)  # the memory format of x decides that of the result
_native.LIB.define(
    "causal_conv3d(Tensor x, Tensor? history, Tensor weight, Tensor? bias, Tensor? residual, "
    f"{_GEOMETRY}) -> Tensor",
    tags=_TAGS,
)
_native.LIB.define(
    "causal_conv3d_input_grad(Tensor dy, Tensor weight, SymInt[] x_size, SymInt history_frames, "
    f"bool channels_last, {_GEOMETRY}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_native.LIB.define(
    "causal_conv3d_weight_grad(Tensor x, Tensor? history, Tensor dy, int[] kernel, "
    f"{_GEOMETRY}) -> Tensor",
    tags=_TAGS,
)


def _out_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    # Frames of history take the place of as many frames of padding.
    sizes = [geometry.out_size(a, x.shape[2 + a], weight.shape[2 + a]) for a in range(3)]
    return [x.shape[0], weight.shape[0], *sizes]


def _fake_forward(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, *geometry: Any,
) -> Tensor:  # fmt: skip
    size = _out_shape(x, weight, Geometry(*geometry))
    return empty_in_format(x, size, is_channels_last(x))


torch.library.register_fake("magvit_fast::causal_conv3d", _fake_forward, lib=_native.LIB)


def _fake_input_grad(
    dy: Tensor, weight: Tensor, x_size: Sequence[int], history_frames: int, channels_last: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    history_size = [*x_size[:2], history_frames, *x_size[3:]]
    return empty_in_format(dy, x_size, channels_last), empty_in_format(
        dy, history_size, channels_last
    )


torch.library.register_fake(
    "magvit_fast::causal_conv3d_input_grad", _fake_input_grad, lib=_native.LIB
)


def _fake_weight_grad(
    x: Tensor, history: Tensor | None, dy: Tensor, kernel: Sequence[int], *geometry: Any
) -> Tensor:
    groups = Geometry(*geometry).groups
    return empty_in_format(x, [dy.shape[1], x.shape[1] // groups, *kernel], False)


torch.library.register_fake(
    "magvit_fast::causal_conv3d_weight_grad", _fake_weight_grad, lib=_native.LIB
)


# --- launch -----------------------------------------------------------------------------------
def _shape_numbers(
    x_size: Sequence[int], history_frames: int, y_size: Sequence[int], kernel: Sequence[int],
    dtype: torch.dtype, geometry: Geometry,
) -> list[int]:  # fmt: skip
    """What csrc/causal_conv3d/bindings.cpp reads into a Conv3dShape, in its order."""
    numbers = [x_size[0], x_size[1], y_size[1], geometry.groups, history_frames, x_size[2]]
    numbers.append(_native.dtype_code(dtype))
    for axis in range(3):
        earlier = history_frames if axis == 0 else 0
        mode = geometry.space_mode if axis else geometry.time_mode
        numbers += [
            x_size[2 + axis] + earlier, y_size[2 + axis], kernel[axis], geometry.stride[axis],
            geometry.dilation[axis], geometry.padding[2 * axis] - earlier, PAD_MODES.index(mode),
        ]  # fmt: skip
    return [*numbers, _precision.strict(), _native.sm90a(), False]  # last: packed


def _run(
    entry: str, device: torch.device, tensors: Sequence[Tensor | None], numbers: list[int]
) -> None:
    """Allocate the workspace and call `entry` with the addresses of `tensors`."""
    core, where, how = _native.launcher(device)
    size = getattr(core, entry + "_workspace")(numbers, where, how)
    workspace = _native.workspace(size, device)
    addresses = [address(t) for t in tensors]
    getattr(core, entry)(*addresses, workspace.data_ptr(), numbers, where, how)
    _native.finish(device)


def _in_layout(result: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return result
    return torch.empty(result.shape, dtype=result.dtype, device=result.device).copy_(result)


def _launch_forward(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, *geometry: Any,
) -> Tensor:  # fmt: skip
    how = Geometry(*geometry)
    size = _out_shape(x, weight, how)
    y = _native.in_huge_pages(empty_in_format(x, size, True))
    _native.trace("causal_conv3d", x=tuple(x.shape), weight=tuple(weight.shape), dtype=x.dtype,
                  device=x.device, geometry=how)  # fmt: skip
    if y.numel():
        tensors, numbers = operands(x, history, weight, bias, residual, size, how)
        _run("causal_conv3d_forward", x.device, [*tensors, y], numbers)
    return _in_layout(y, is_channels_last(x))


def operands(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, size: Sequence[int], geometry: Geometry,
) -> tuple[list[Tensor | None], list[int]]:  # fmt: skip
    """The tensors of a forward kernel as it takes them, and the numbers of its shape."""
    frames = 0 if history is None else history.shape[2]
    numbers = _shape_numbers(x.shape, frames, size, weight.shape[2:], x.dtype, geometry)
    source, earlier, added = (
        None if v is None else channels_last(v) for v in (x, history, residual)
    )
    bias = None if bias is None else bias.contiguous()
    packed = _packed_weights.of_conv(weight, numbers, True, [source, earlier, bias, added])
    return [source, earlier, packed, bias, added], numbers


def _launch_input_grad(
    dy: Tensor, weight: Tensor, x_size: Sequence[int], history_frames: int, in_channels_last: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = Geometry(*geometry)
    dx = _native.in_huge_pages(empty_in_format(dy, x_size, True))
    dhistory = empty_in_format(dy, [*x_size[:2], history_frames, *x_size[3:]], True)
    _native.trace("causal_conv3d_input_grad", dy=tuple(dy.shape), weight=tuple(weight.shape),
                  dtype=dy.dtype, device=dy.device, geometry=how)  # fmt: skip
    if dx.numel():
        numbers = _shape_numbers(x_size, history_frames, dy.shape, weight.shape[2:], dy.dtype, how)
        earlier, source = dhistory if history_frames else None, channels_last(dy)
        packed = _packed_weights.of_conv(weight, numbers, False, [source, dx, earlier])
        tensors = [source, packed, dx, earlier]
        _run("causal_conv3d_input_grad", dy.device, tensors, numbers)
    return _in_layout(dx, in_channels_last), _in_layout(dhistory, in_channels_last)


def _launch_weight_grad(
    x: Tensor, history: Tensor | None, dy: Tensor, kernel: Sequence[int], *geometry: Any
) -> Tensor:
    how = Geometry(*geometry)
    dweight = empty_in_format(x, [dy.shape[1], x.shape[1] // how.groups, *kernel], False)
    _native.trace("causal_conv3d_weight_grad", x=tuple(x.shape), dweight=tuple(dweight.shape),
                  dtype=x.dtype, device=x.device, geometry=how)  # fmt: skip
    if not dy.numel():
        return dweight.zero_()
    earlier = None if history is None else channels_last(history)
    frames = 0 if history is None else history.shape[2]
    numbers = _shape_numbers(x.shape, frames, dy.shape, kernel, x.dtype, how)
    tensors = [channels_last(x), earlier, channels_last(dy), dweight]
    _run("causal_conv3d_weight_grad", x.device, tensors, numbers)
    return dweight


for _device in ("CPU", "CUDA"):
    _native.LIB.impl("causal_conv3d", _launch_forward, _device)
    _native.LIB.impl("causal_conv3d_input_grad", _launch_input_grad, _device)
    _native.LIB.impl("causal_conv3d_weight_grad", _launch_weight_grad, _device)
_FORWARD = torch.ops.magvit_fast.causal_conv3d.default
_INPUT_GRAD = torch.ops.magvit_fast.causal_conv3d_input_grad.default
_WEIGHT_GRAD = torch.ops.magvit_fast.causal_conv3d_weight_grad.default


# --- autograd ---------------------------------------------------------------------------------
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
        residual: Tensor | None, geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, history, weight)
        ctx.geometry = geometry
        return _FORWARD(x, history, weight, bias, residual, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *forward_grads(ctx, grads[0]), None


def forward_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, history, weight, bias and residual, the first inputs of a Function."""
    x, history, weight = ctx.saved_tensors
    dx = dhistory = dweight = dbias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dx, dhistory = _input_grad(dy, weight, x, history, ctx.geometry)
    if ctx.needs_input_grad[2]:
        dweight = _weight_grad(x, history, dy, weight.shape[2:], ctx.geometry)
    if ctx.needs_input_grad[3]:
        dbias = dy.sum((0, 2, 3, 4))
    return dx, dhistory, dweight, dbias, dy if ctx.needs_input_grad[4] else None


class _InputGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, weight: Tensor, x_size: list[int], history_frames: int,
        channels_last: bool, geometry: Geometry,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(dy, weight)
        ctx.history_frames, ctx.geometry = history_frames, geometry
        return _INPUT_GRAD(dy, weight, x_size, history_frames, channels_last, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = grads[0]  # what meets dx: of the kind of x
        history = grads[1] if ctx.history_frames else None
        dy, weight = ctx.saved_tensors
        ddy = dweight = None
        if ctx.needs_input_grad[0]:
            ddy = _forward(x, history, weight, None, None, ctx.geometry)
        if ctx.needs_input_grad[1]:
            dweight = _weight_grad(x, history, dy, weight.shape[2:], ctx.geometry)
        return ddy, dweight, None, None, None, None


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, dy: Tensor, kernel: list[int],
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, history, dy)
        ctx.geometry = geometry
        return _WEIGHT_GRAD(x, history, dy, kernel, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = grads  # what meets dweight: of the kind of weight
        x, history, dy = ctx.saved_tensors
        dx = dhistory = ddy = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx, dhistory = _input_grad(dy, weight, x, history, ctx.geometry)
        if ctx.needs_input_grad[2]:
            ddy = _forward(x, history, weight, None, None, ctx.geometry)
        return dx, dhistory, ddy, None, None


# Where nothing is recorded (inference, and the backward pass itself) the ops are called at once: a
# torch.autograd.Function takes as long as a small kernel.
def _forward(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, geometry: Geometry,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        return _Forward.apply(x, history, weight, bias, residual, geometry)  # type: ignore[no-untyped-call, no-any-return]
    return _FORWARD(x, history, weight, bias, residual, *geometry)  # type: ignore[no-any-return]


def _input_grad(
    dy: Tensor, weight: Tensor, x: Tensor, history: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    frames = 0 if history is None else history.shape[2]
    sizes = list(x.shape), frames, is_channels_last(x)
    if torch.is_grad_enabled():
        dx, dhistory = _InputGrad.apply(dy, weight, *sizes, geometry)  # type: ignore[no-untyped-call]
    else:
        dx, dhistory = _INPUT_GRAD(dy, weight, *sizes, *geometry)
    return dx, dhistory if frames else None


def _weight_grad(
    x: Tensor, history: Tensor | None, dy: Tensor, kernel: Sequence[int], geometry: Geometry
) -> Tensor:
    if torch.is_grad_enabled():
        return _WeightGrad.apply(x, history, dy, list(kernel), geometry)  # type: ignore[no-untyped-call, no-any-return]
    return _WEIGHT_GRAD(x, history, dy, list(kernel), *geometry)  # type: ignore[no-any-return]


# --- public -----------------------------------------------------------------------------------
class Call(NamedTuple):
    """A call whose arguments have been checked; `native`: the kernels serve it."""

    x: Tensor
    history: Tensor | None
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    geometry: Geometry
    native: bool


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sequence[int],
    dilation: int | Sequence[int], groups: int, padding: Sequence[int] | None, time_mode: PadMode,
    space_mode: PadMode, history: Tensor | None, residual: Tensor | None, impl: str,
) -> Call:  # fmt: skip
    """Check the arguments of causal_conv3d and decide who serves them."""
    _checks.check_choice("time_mode", time_mode, PAD_MODES)
    _checks.check_choice("space_mode", space_mode, PAD_MODES)
    x, weight, bias, history, residual = _checks.under_autocast(x, weight, bias, history, residual)
    _conv_checks.check_operands(x, weight, bias, history, groups)
    steps = _checks.triple("stride", stride)
    spread = _checks.triple("dilation", dilation)
    _conv_checks.check_padding(padding)
    pads = resolve_padding(weight.shape[2:], spread, padding)
    if history is not None:  # the frames that replace padding; none: as if there were no history
        used = min(history.shape[2], pads[0])
        history = history[:, :, history.shape[2] - used :] if used else None
    geometry = Geometry(list(steps), list(spread), groups, pads, time_mode, space_mode)
    _conv_checks.check_geometry(x, history, weight, geometry)
    if residual is not None:
        _conv_checks.check_residual(residual, x, _out_shape(x, weight, geometry))
    obstacle = _native.native_dtype_obstacle(x.dtype) or _native.missing_core(x.device)
    slower = torch_is_faster(x, weight, steps, spread, groups)
    native = _native.use_native("causal_conv3d", impl, obstacle, slower=slower)
    return Call(x, history, weight, bias, residual, geometry, native)


def run(call: Call) -> Tensor:
    serve = _forward if call.native else reference
    return serve(call.x, call.history, call.weight, call.bias, call.residual, call.geometry)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] | list[int] = 1,
    dilation: int | tuple[int, ...] | list[int] = 1,
    groups: int = 1,
    padding: Sequence[int] | None = None,
    time_mode: PadMode = "zeros",
    space_mode: PadMode = "zeros",
    history: Tensor | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """3D convolution that never looks ahead in time (unless `padding` says so).

    Args:
        x: [B, C_in, T, H, W]; any floating dtype, any strides. channels_last_3d is the fast layout.
        weight: [C_out, C_in / groups, KT, KH, KW], dtype and device of x.
        bias: [C_out] or None.
        stride, dilation: an int or three (time, height, width).
        padding: None: dilation * (KT - 1) frames in front, none behind, and "same" in space with the
            smaller half first; or six ints (front, back, top, bottom, left, right).
        time_mode, space_mode: what the padding holds: "zeros", "replicate" (the edge repeated) or
            "reflect" (the mirror image without the edge; pads must be smaller than the axis).
        history: [B, C_in, Th, H, W], the frames before x. The last `front` of them stand in for the
            front padding (all of them if there are fewer; the rest is padded by time_mode).
        residual: [B, C_out, T', H', W'], added to the result; natively in float32, before it is
            rounded.
        impl: "auto", "native" or "reference"; what "auto" leaves to PyTorch: ops/_conv_choice.py.

    Returns:
        [B, C_out, T', H', W'] in x's dtype and memory format, with
        size' = (size + pads - dilation * (K - 1) - 1) // stride + 1 on each axis (history counts as
        padding). Twice differentiable in all tensors. Sums are kept in float32.

    Precision, on the CPU: 3x3 planes at stride 1 go by Winograd's algorithm where it pays, which
    multiplies less and rounds more. Errors against float64, relative to the largest result:

        float32, default                    F(4x4) and F(4) in time   up to 5e-6, budget 1e-5
        float32, strict                     F(2x2) and F(2) in time   up to 5e-7, PyTorch's own: 2e-6
        bfloat16, float16 (float32 inside)  F(4x4) and F(4) in time   that of rounding the result

    Strict is what torch's own switches ask for: torch.backends.mkldnn.conv.fp32_precision = "ieee" or,
    while that is "none", torch.backends.fp32_precision = "ieee" or a call of
    torch.set_float32_matmul_precision("highest"). It takes about 1.7 times as long. (On GPUs torch's
    convolutions use TF32 unless told otherwise, which is a hundred times coarser than the default here.)
    Four frames and 4x4 pixels share their products: a NaN or an infinity reaches all of them, those of
    earlier frames too, and chunks with history equal the whole but for rounding.

    Raises:
        ValueError: shapes, groups, pads or modes that do not fit together.
        TypeError: tensors that are not floating point or differ in dtype.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737) section 3.2 (causal convolution); MAGVIT v1 has back > 0.
    """
    call = prepare(
        x, weight, bias, stride, dilation, groups, padding, time_mode, space_mode, history, residual,
        impl,
    )  # fmt: skip
    return run(call)
