"""Causal down- and up-sampling by two in space, and by two in time where asked."""

from __future__ import annotations

from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.nn.conv import CausalConv3d
from magvit_fast.nn.stream import StreamState


class Downsample(CausalConv3d):
    """Strided causal 4x4x4 convolution with bias, to ceil(T / s_t) x ceil(H / 2) x ceil(W / 2).

    s_t is 2 where `temporal`, else 1. The paper's figure says 3x3x3; its parameter count (58M in
    Table 5a) and Google's port say 4x4x4.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__(channels, channels, 4, (2 if temporal else 1, 2, 2))


class Upsample(nn.Module):
    """Causal 3x3x3 convolution to s_t * 4 times the channels, then depth to space.

    The first s_t - 1 frames of the result are dropped, so that t slots give s_t * (t - 1) + 1
    frames; in a stream that happens in the first chunk only.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.factor = (2 if temporal else 1, 2, 2)
        self.conv = CausalConv3d(channels, channels * self.factor[0] * 4, 3)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, s_t * T - dropped, 2 H, 2 W]."""
        drop = 0 if state is not None and state.started else self.factor[0] - 1
        return ops.depth_to_space3d(self.conv(x, state), self.factor, drop_first=drop)
