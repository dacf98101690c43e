"""causal_conv3d: reference only for now; the native door is added by its room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PadMode = Literal["zeros", "replicate", "reflect"]


def resolve_padding(kernel, dilation, padding):
    if padding is not None:
        return tuple(int(p) for p in padding)
    kt, kh, kw = kernel
    dt, dh, dw = dilation
    th, tw = dh * (kh - 1), dw * (kw - 1)
    return dt * (kt - 1), 0, th // 2, th - th // 2, tw // 2, tw - tw // 2


def _pad(x: Tensor, pads: Sequence[int], mode: str) -> Tensor:
    if not any(pads):
        return x
    return F.pad(x, list(pads), mode="constant" if mode == "zeros" else mode)


def reference(x, weight, bias, stride, dilation, groups, padding, time_mode, space_mode, history):
    front, back, top, bottom, left, right = padding
    if history is not None and front > 0:
        history = history[:, :, -front:]
        x = torch.cat([history.to(x.dtype), x], dim=2)
        front -= history.shape[2]
    x = _pad(x, (0, 0, 0, 0, front, back), time_mode)
    conv_pad = [0, 0, 0]
    if space_mode == "zeros" and top == bottom and left == right:
        conv_pad = [0, top, left]
    else:
        x = _pad(x, (left, right, top, bottom, 0, 0), space_mode)
    return F.conv3d(x, weight, bias, stride, conv_pad, dilation, groups)


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride=1, dilation=1, groups: int = 1,
    padding=None, time_mode: PadMode = "zeros", space_mode: PadMode = "zeros",
    history: Tensor | None = None, impl: str = "auto",
) -> Tensor:
    stride = (stride,) * 3 if isinstance(stride, int) else tuple(stride)
    dilation = (dilation,) * 3 if isinstance(dilation, int) else tuple(dilation)
    padding = resolve_padding(weight.shape[2:], dilation, padding)
    return reference(x, weight, bias, stride, dilation, groups, padding, time_mode, space_mode, history)
