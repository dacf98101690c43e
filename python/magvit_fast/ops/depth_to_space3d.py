"""depth_to_space3d: unfold channels into time, height and width.

Next hop: `_core.depth_to_space3d_permute` / `_core_cuda.depth_to_space3d_permute`
(csrc/depth_to_space3d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks
from magvit_fast.ops._layout import channels_last, empty_in_format, is_channels_last

# --- contract ---------------------------------------------------------------------------------
# x [B, s_t * s_h * s_w * C, T, H, W] -> [B, C, T * s_t - drop_first, H * s_h, W * s_w].
# The channel axis is read as (s_t, s_h, s_w, C) with C fastest:
#     y[b, c, t*s_t + i, h*s_h + j, w*s_w + k] = x[b, ((i*s_h + j)*s_w + k)*C + c, t, h, w].
# `drop_first` removes that many leading frames of the result: a causal up-sampler drops s_t - 1.
# The result is dense in x's memory format. A pure permutation: exact in every dtype; its gradient is
# the inverse with zeros for what was dropped, and the gradient of that is itself again.
# Source: MAGVIT-v2, appendix architecture figure and the causal up-sampler of section 3.


# --- reference --------------------------------------------------------------------------------
def reference(x: Tensor, factor: Sequence[int], drop_first: int) -> Tensor:
    """Plain torch, any dtype, differentiable."""
    st, sh, sw = factor
    b, deep, t, h, w = x.shape
    c = deep // (st * sh * sw)
    last = is_channels_last(x)
    if last:
        y = x.permute(0, 2, 3, 4, 1).reshape(b, t, h, w, st, sh, sw, c)
        y = y.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * st, h * sh, w * sw, c)
        y = y.permute(0, 4, 1, 2, 3)
    else:
        y = x.reshape(b, st, sh, sw, c, t, h, w)
        y = y.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(b, c, t * st, h * sh, w * sw)
    y = y[:, :, drop_first:]
    return channels_last(y) if last else y.contiguous()


# --- schema and fake --------------------------------------------------------------------------
_TAGS = (torch.Tag.needs_exact_strides,)  # the memory format of x decides that of the result
_native.LIB.define(
    "depth_to_space3d(Tensor x, int[] factor, SymInt drop_first) -> Tensor", tags=_TAGS
)
_native.LIB.define(
    "depth_to_space3d_backward(Tensor dy, int[] factor, SymInt drop_first) -> Tensor", tags=_TAGS
)


def _wide_size(x: Tensor, factor: Sequence[int], drop_first: int) -> list[int]:
    (b, deep, t, h, w), (st, sh, sw) = x.shape, factor
    return [b, deep // (st * sh * sw), t * st - drop_first, h * sh, w * sw]


def _deep_size(y: Tensor, factor: Sequence[int], drop_first: int) -> list[int]:
    (b, c, t, h, w), (st, sh, sw) = y.shape, factor
    return [b, c * st * sh * sw, (t + drop_first) // st, h // sh, w // sw]


def _fake(x: Tensor, factor: Sequence[int], drop_first: int) -> Tensor:
    return empty_in_format(x, _wide_size(x, factor, drop_first), is_channels_last(x))


def _fake_backward(dy: Tensor, factor: Sequence[int], drop_first: int) -> Tensor:
    return empty_in_format(dy, _deep_size(dy, factor, drop_first), is_channels_last(dy))


torch.library.register_fake("magvit_fast::depth_to_space3d", _fake, lib=_native.LIB)
torch.library.register_fake(
    "magvit_fast::depth_to_space3d_backward", _fake_backward, lib=_native.LIB
)


# --- launch -----------------------------------------------------------------------------------
def _permute(source: Tensor, result: Tensor, to_depth: bool, factor: Sequence[int], drop: int) -> Tensor:  # fmt: skip
    deep, wide = (result, source) if to_depth else (source, result)
    last = is_channels_last(source)
    source = channels_last(source) if last else source.contiguous()
    _native.trace("depth_to_space3d", deep=tuple(deep.shape), wide=tuple(wide.shape),
                  dtype=source.dtype, device=source.device)  # fmt: skip
    if result.numel():
        _native.in_huge_pages(result)
        core, where, how = _native.launcher(source.device)
        core.depth_to_space3d_permute(
            source.data_ptr(), result.data_ptr(), *wide.shape[:2], *deep.shape[2:], *factor, drop,
            source.element_size(), last, to_depth, where, how,
        )  # fmt: skip
        _native.finish(source.device)
    return result


def _launch(x: Tensor, factor: Sequence[int], drop_first: int) -> Tensor:
    return _permute(x, _fake(x, factor, drop_first), False, factor, drop_first)


def _launch_backward(dy: Tensor, factor: Sequence[int], drop_first: int) -> Tensor:
    return _permute(dy, _fake_backward(dy, factor, drop_first), True, factor, drop_first)


for _device in ("CPU", "CUDA"):
    _native.LIB.impl("depth_to_space3d", _launch, _device)
    _native.LIB.impl("depth_to_space3d_backward", _launch_backward, _device)
_OP = torch.ops.magvit_fast.depth_to_space3d.default
_BACKWARD = torch.ops.magvit_fast.depth_to_space3d_backward.default


# --- autograd ---------------------------------------------------------------------------------
class _DepthToSpace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: list[int], drop_first: int) -> Tensor:
        ctx.how = (factor, drop_first)
        return _OP(x, factor, drop_first)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _SpaceToDepth.apply(grads[0], *ctx.how), None, None  # type: ignore[no-untyped-call]


class _SpaceToDepth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, factor: list[int], drop_first: int) -> Tensor:
        ctx.how = (factor, drop_first)
        return _BACKWARD(dy, factor, drop_first)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _DepthToSpace.apply(grads[0], *ctx.how), None, None  # type: ignore[no-untyped-call]


# --- public -----------------------------------------------------------------------------------
def depth_to_space3d(
    x: Tensor, factor: int | tuple[int, int, int], *, drop_first: int = 0, impl: str = "auto"
) -> Tensor:
    """Depth to space over time, height and width: channels (s_t, s_h, s_w, C), C fastest, become
    positions.

    Args:
        x: [B, s_t * s_h * s_w * C, T, H, W]; any dtype, any strides.
        factor: s_t, s_h, s_w, or one int for all.
        drop_first: leading frames that the result leaves out.
        impl: "auto", "native" or "reference".

    Returns:
        [B, C, T * s_t - drop_first, H * s_h, W * s_w] in x's memory format, exact. Twice
        differentiable.

    Raises:
        TypeError, ValueError: x is not 5-D, its channels are no multiple of the product of
            `factor`, or `drop_first` is negative or larger than the T * s_t frames there are.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737), appendix architecture figure.
    """
    _checks.check_tensor("x", x, ndim=5)
    factors = _checks.triple("factor", factor)
    product = factors[0] * factors[1] * factors[2]
    if x.shape[1] % product:
        raise ValueError(
            f"x: expected channels in a multiple of {product} (factor {factors}), got {x.shape[1]}"
        )
    frames = x.shape[2] * factors[0]
    _checks.check_int("drop_first", drop_first)
    if not 0 <= drop_first <= frames:
        raise ValueError(f"drop_first: expected 0..{frames}, got {drop_first}")
    obstacle = _native.missing_core(x.device)
    if x.element_size() > 8:
        obstacle = f"dtype {x.dtype} is served by the reference only (native: up to 8 bytes)"
    if _native.use_native("depth_to_space3d", impl, obstacle):
        return _DepthToSpace.apply(x, list(factors), drop_first)  # type: ignore[no-untyped-call, no-any-return]
    return reference(x, factors, drop_first)
