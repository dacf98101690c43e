"""Down- and up-sampling by two in space, and by two in time where asked: learned, or by pooling.

In causal layers t frames become ceil(t / 2) and t slots become 2 t - 1 frames: slot 0 is the first
frame alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.nn.norm import upsample_nearest
from magvit_fast.nn.stream import StreamState
from magvit_fast.nn.style import CAUSAL, TWO_SIDED, LayerStyle
from magvit_fast.ops._conv_fused import joins_passes


def strided_conv(
    channels: int, *, temporal: bool, kernel: int = 4, style: LayerStyle = CAUSAL
) -> nn.Module:
    """Strided convolution with bias, to ceil(T / s_t) x ceil(H / 2) x ceil(W / 2).

    s_t is 2 where `temporal`, else 1. The figure of MAGVIT-v2 says 3x3x3; its parameter count (58M
    in Table 5a) and Google's port say 4x4x4.
    """
    return style.conv(channels, channels, kernel, (2 if temporal else 1, 2, 2))


class Upsample(nn.Module):
    """Convolution 3x3x3 to s_t * 4 times the channels, then depth to space.

    Causal: the first s_t - 1 frames of the result are dropped, so that t slots give
    s_t * (t - 1) + 1 frames; in a stream that happens in the first chunk only. With
    `keep_first_frame` (Open-MAGVIT2) it is the frames behind the first that are dropped instead.
    """

    def __init__(
        self,
        channels: int,
        *,
        temporal: bool,
        keep_first_frame: bool = False,
        style: LayerStyle = CAUSAL,
    ) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)
        self.causal = style.causal
        self.keep_first_frame = keep_first_frame
        self.conv = style.conv(channels, channels * self.factor[0] * 4)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, s_t * T - dropped, 2 H, 2 W]."""
        drop = _dropped(self.factor[0], self.causal, state)
        keep = drop > 0 and self.keep_first_frame
        dropped = 0 if keep else drop
        if joins_passes(x):
            y = self.conv.to_space(x, self.factor, dropped, state)
        else:
            y = ops.depth_to_space3d(self.conv(x, state), self.factor, drop_first=dropped)
        return torch.cat([y[:, :, :1], y[:, :, 1 + drop :]], dim=2) if keep else y


def average_pool(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """Means over windows of `factor` cells (t, h, w); sizes round up, cells beyond do not count."""
    # a window longer than its axis is refused by torch and would count the same cells
    t, h, w = (min(k, n) for k, n in zip(factor, x.shape[2:], strict=True))
    if x.stride(1) != 1:
        return F.avg_pool3d(x, (t, h, w), ceil_mode=True, count_include_pad=False)
    # PyTorch pools channels-last images as they lie, but clips only after copies there and back.
    batch, frames = x.shape[0], x.shape[2]
    images = x.transpose(1, 2).flatten(0, 1)
    y = F.avg_pool2d(images, (h, w), ceil_mode=True, count_include_pad=False)
    y = y.permute(0, 2, 3, 1).unflatten(0, (batch, frames))  # [B, T, H', W', C], dense
    if t > 1:
        whole = frames // t * t
        slots = y[:, :whole].unflatten(1, (whole // t, t)).mean(2)
        y = torch.cat([slots, y[:, whole:].mean(1, keepdim=True)], 1) if whole < frames else slots
    return y.permute(0, 4, 1, 2, 3)


class AveragePool(nn.Module):
    """Mean over windows of (s_t, 2, 2); odd sizes round up and count what is there alone.

    Causal: windows end at frames 0, 2, 4, ..., the first one holds frame 0 alone.
    """

    def __init__(self, *, temporal: bool, style: LayerStyle = TWO_SIDED) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)
        self.causal = style.causal

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, ceil(T / s_t), ceil(H / 2), ceil(W / 2)]."""
        if _dropped(self.factor[0], self.causal, state):
            x = torch.cat([x[:, :, :1], x], dim=2)  # frame 0 twice: the mean of it alone
        return average_pool(x, self.factor)


class NearestUpsample(nn.Module):
    """Every value repeated (s_t, 2, 2) times, then a 3x3x3 convolution with bias.

    Causal: the first s_t - 1 frames are dropped as in Upsample.
    """

    def __init__(self, channels: int, *, temporal: bool, style: LayerStyle = TWO_SIDED) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)
        self.causal = style.causal
        self.conv = style.conv(channels, channels)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, s_t * T - dropped, 2 H, 2 W]."""
        frames = x.shape[2] * self.factor[0] - _dropped(self.factor[0], self.causal, state)
        out: Tensor = self.conv(upsample_nearest(x, self.factor, frames), state)
        return out


def _dropped(time_factor: int, causal: bool, state: StreamState | None) -> int:
    """Leading frames that a causal change of resolution leaves out; none in a running stream."""
    return time_factor - 1 if causal and not (state is not None and state.started) else 0
