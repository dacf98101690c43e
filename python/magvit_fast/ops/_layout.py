"""How a tensor with a channel axis lies in memory, in the terms of the kernels: outer, channels, inner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """The axes before the channel axis merged into `outer`, those after it into `inner`.

    Where there are none after it, those before it are `inner`: kernels run along that one.
    """

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
    if inner == 1:
        return Block(1, x.shape[axis], outer, 0, x.stride(axis), outer_stride)
    return Block(outer, x.shape[axis], inner, outer_stride, x.stride(axis), inner_stride)


def walked_alike(z: Tensor, result: Tensor, axis: int) -> tuple[Tensor, Tensor, Block]:
    """z, and what a kernel writes that walks both as one block in memory.

    `result` is empty_like(z), whose strides a fake kernel can tell; it is what the kernel writes
    wherever they make a block.
    """
    if result.stride() != z.stride():  # z is not dense, the result is
        z = torch.empty_like(z).copy_(z)
    block = block_of(z, axis)
    if block is not None:
        return z, result, block
    z = z.contiguous()
    block = block_of(z, axis)
    assert block is not None  # a contiguous tensor always has one
    return z, torch.empty_like(z), block


def without_axis(x: Tensor, axis: int) -> list[int]:
    return [n for a, n in enumerate(x.shape) if a != axis]


def is_channels_last(x: Tensor) -> bool:
    """Whether a 5-D tensor lies channels-last, dense or with frames, rows or columns cut off."""
    return x.stride(1) == 1 and x.stride(4) >= x.shape[1]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def empty_in_format(x: Tensor, size: Sequence[int], in_channels_last: bool) -> Tensor:
    """Room for a 5-D result of x's dtype and device, dense in one of the two memory formats."""
    layout = torch.channels_last_3d if in_channels_last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def address(x: Tensor | None) -> int:
    """What a kernel takes for a tensor; 0 for an absent one."""
    return 0 if x is None else x.data_ptr()
