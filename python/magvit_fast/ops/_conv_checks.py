"""What causal_conv3d demands of its arguments.

Next hop: none; ops/causal_conv3d.py asks before every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from magvit_fast.ops import _checks

if TYPE_CHECKING:
    from magvit_fast.ops.causal_conv3d import Geometry

AXES = ("time", "height", "width")


def check_padding(padding: Sequence[int] | None) -> None:
    if padding is None:
        return
    # The messages are written where they are needed: torch.compile cannot trace the repr of an int
    # that it keeps open (padding that follows the size of x, with dynamic shapes).
    if not isinstance(padding, (tuple, list)):
        raise TypeError(f"padding: expected None or six ints >= 0, got {padding!r}")
    for pad in padding:
        _checks.check_int("padding", pad)
    if len(padding) != 6 or min(padding) < 0:
        raise ValueError(f"padding: expected None or six ints >= 0, got {padding!r}")


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, groups: int
) -> None:
    _checks.check_tensor("x", x, ndim=5, floating=True)
    _checks.check_tensor("weight", weight, ndim=5, floating=True)
    _checks.check_same("weight", weight, "x", x)
    channels, out_channels = x.shape[1], weight.shape[0]
    _checks.check_int("groups", groups)
    if groups < 1 or channels % groups or out_channels % groups:
        raise ValueError(
            f"groups: expected a divisor of C_in = {channels} and of C_out = {out_channels}, "
            f"got {groups}"
        )
    if weight.shape[1] * groups != channels or min(weight.shape) < 1:
        raise ValueError(
            f"weight: expected [C_out, {channels // groups}, KT, KH, KW] for x with {channels} "
            f"channels and groups={groups}, got {tuple(weight.shape)}"
        )
    if min(x.shape[2:]) < 1:
        raise ValueError(f"x: expected at least one frame, row and column, got {tuple(x.shape)}")
    if bias is not None:
        _checks.check_tensor("bias", bias, ndim=1, floating=True)
        _checks.check_same("bias", bias, "x", x)
        if bias.shape[0] != out_channels:
            raise ValueError(f"bias: expected [{out_channels}], got {tuple(bias.shape)}")
    if history is not None:
        _checks.check_tensor("history", history, ndim=5, floating=True)
        _checks.check_same("history", history, "x", x)
        if history.shape[:2] != x.shape[:2] or history.shape[3:] != x.shape[3:]:
            raise ValueError(
                f"history: expected [{x.shape[0]}, {x.shape[1]}, Th, {x.shape[3]}, {x.shape[4]}] "
                f"(x but for its frames), got {tuple(history.shape)}"
            )


def check_geometry(x: Tensor, history: Tensor | None, weight: Tensor, geometry: Geometry) -> None:
    for axis, name in enumerate(AXES):
        earlier = history.shape[2] if history is not None and axis == 0 else 0
        source, kernel = x.shape[2 + axis] + earlier, weight.shape[2 + axis]
        before, after = geometry.padding[2 * axis] - earlier, geometry.padding[2 * axis + 1]
        mode = geometry.space_mode if axis else geometry.time_mode
        if mode == "reflect" and max(before, after) >= source:
            raise ValueError(
                f"padding: reflection in {name} needs pads smaller than the {source} "
                f"elements there, got ({before}, {after})"
            )
        span = geometry.dilation[axis] * (kernel - 1) + 1
        if source + before + after < span:
            raise ValueError(
                f"x: {name} has {source} elements and padding ({before}, {after}), "
                f"fewer than the {span} that the kernel spans"
            )


def check_residual(residual: Tensor, x: Tensor, size: list[int]) -> None:
    _checks.check_tensor("residual", residual, ndim=5, floating=True)
    _checks.check_same("residual", residual, "x", x)
    if list(residual.shape) != size:
        raise ValueError(
            f"residual: expected the shape of the result, {tuple(size)}, got {tuple(residual.shape)}"
        )
