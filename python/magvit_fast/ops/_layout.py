"""How a tensor with a channel axis lies in memory, in the terms of the kernels: outer, channels, inner."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """The axes before the channel axis merged into `outer`, those after it into `inner`."""

    outer: int
    channels: int
    inner: int
    outer_stride: int
    channel_stride: int
    inner_stride: int


def block_of(x: Tensor, axis: int) -> Block | None:
    """The block that x is in memory, or None where axes of one side do not merge into one stride."""

    def merged_stride(first: int, last: int) -> int | None:
        stride, expected = 1, None
        for a in reversed(range(first, last)):
            if x.shape[a] == 1:
                continue
            if expected is None:
                stride = x.stride(a)
            elif x.stride(a) != expected:
                return None
            expected = x.stride(a) * x.shape[a]
        return stride

    outer_stride, inner_stride = merged_stride(0, axis), merged_stride(axis + 1, x.dim())
    if outer_stride is None or inner_stride is None:
        return None
    outer, inner = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    return Block(outer, x.shape[axis], inner, outer_stride, x.stride(axis), inner_stride)


def without_axis(x: Tensor, axis: int) -> list[int]:
    return [n for a, n in enumerate(x.shape) if a != axis]
