"""blur_pool3d: depthwise binomial low-pass with stride, the pooling of the discriminator.

contract
    x [B, C, T, H, W] -> [B, C, ceil(T/s), ceil(H/s), ceil(W/s)].
    Taps are the binomial coefficients of filter_size, normalized to sum 1, along each of t, h, w.
    Padding is zero, by the rule of TensorFlow's SAME: total = max((ceil(n/s) - 1) * s + k - n, 0),
    the smaller half first (k = 3, s = 2: an even length gets (0, 1), an odd one (1, 1)). Borders
    are not renormalized, so an axis of length 1 is halved.
    Source: MAGVIT-v2 section 3.3 ("3D blur pooling") in the exact form of Google's released layers.
    Linear, hence differentiable any number of times. No state, no randomness.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks

# ---------------------------------------------------------------- reference


def reference(x: Tensor, stride: tuple[int, int, int], filter_size: int) -> Tensor:
    """Three depthwise convolutions, one an axis; exact in any dtype for any order of summation."""
    taps = [math.comb(filter_size - 1, i) / 2 ** (filter_size - 1) for i in range(filter_size)]
    channels = x.shape[1]
    for axis in range(3):
        before, after = same_padding(x.shape[2 + axis], filter_size, stride[axis])
        pads = [0] * 6
        pads[2 * (2 - axis)], pads[2 * (2 - axis) + 1] = before, after
        shape = [1, 1, 1]
        shape[axis] = filter_size
        kernel = torch.tensor(taps, dtype=x.dtype, device=x.device).view(1, 1, *shape)
        step = [1, 1, 1]
        step[axis] = stride[axis]
        x = F.conv3d(
            F.pad(x, pads), kernel.expand(channels, 1, *shape), stride=step, groups=channels
        )
    return x


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis by the SAME rule."""
    total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


# ---------------------------------------------------------------- public


def blur_pool3d(
    x: Tensor, stride: int | tuple[int, int, int] = 2, *, filter_size: int = 3, impl: str = "auto"
) -> Tensor:
    """Low-pass filter and subsample x [B, C, T, H, W] along t, h and w; see the contract above.

    Raises ValueError or TypeError that names the argument; NotImplementedError for impl="native"
    (there is no kernel yet).
    """
    _checks.check_tensor("x", x, ndim=5, floating=True)
    steps = _checks.triple("stride", stride)
    if filter_size < 1:
        raise ValueError(f"filter_size: expected 1 or more, got {filter_size}")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"x: expected non-empty time and space axes, got {tuple(x.shape)}")
    _native.use_native("blur_pool3d", impl, "there is no native kernel yet")
    return reference(x, steps, filter_size)
