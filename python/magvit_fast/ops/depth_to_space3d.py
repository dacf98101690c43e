"""depth_to_space3d: unfold channels into time, height and width.

Contract
    x [B, s_t * s_h * s_w * C, T, H, W] -> [B, C, T * s_t - drop_first, H * s_h, W * s_w].
    The channel axis is read as (s_t, s_h, s_w, C) with C fastest:
        y[b, c, t*s_t + i, h*s_h + j, w*s_w + k] = x[b, ((i*s_h + j)*s_w + k)*C + c, t, h, w].
    `drop_first` removes that many leading frames of the result: a causal up-sampler drops s_t - 1.
    The result has x's memory format. A pure permutation: exact in every dtype.
Source
    MAGVIT-v2, appendix architecture figure and the causal up-sampler of section 3.
"""

from __future__ import annotations

from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops._checks import check_int, check_tensor, triple

_NO_KERNEL = "this op has no native kernel yet; its reference serves every device"


def reference(x: Tensor, factor: tuple[int, int, int], drop_first: int) -> Tensor:
    st, sh, sw = factor
    b, deep, t, h, w = x.shape
    c = deep // (st * sh * sw)
    if x.stride(1) == 1:  # channels-last
        y = x.permute(0, 2, 3, 4, 1).reshape(b, t, h, w, st, sh, sw, c)
        y = y.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * st, h * sh, w * sw, c)
        y = y.permute(0, 4, 1, 2, 3)
    else:
        y = x.reshape(b, st, sh, sw, c, t, h, w)
        y = y.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(b, c, t * st, h * sh, w * sw)
    return y[:, :, drop_first:]


def depth_to_space3d(
    x: Tensor, factor: int | tuple[int, int, int], *, drop_first: int = 0, impl: str = "auto"
) -> Tensor:
    """Depth to space over three axes; see the module's text for the channel order.

    Raises:
        TypeError, ValueError: x is not 5-D, its channels are no multiple of the product of
            `factor`, or `drop_first` is negative or larger than the T * s_t frames there are.
        NotImplementedError: impl="native" (no kernel yet).
    """
    check_tensor("x", x, ndim=5)
    factors = triple("factor", factor)
    product = factors[0] * factors[1] * factors[2]
    if x.shape[1] % product:
        raise ValueError(
            f"x: expected channels in a multiple of {product} (factor {factors}), got {x.shape[1]}"
        )
    frames = x.shape[2] * factors[0]
    check_int("drop_first", drop_first)
    if not 0 <= drop_first <= frames:
        raise ValueError(f"drop_first: expected 0..{frames}, got {drop_first}")
    _native.use_native("depth_to_space3d", impl, _NO_KERNEL)
    return reference(x, factors, drop_first)
