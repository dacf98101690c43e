"""The blocks of the tokenizers: the residual block of all of them, the attention block of VQ-GAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magvit_fast.nn.attention import SelfAttention
from magvit_fast.nn.norm import MAX_GROUPS, GroupNormSiLU
from magvit_fast.nn.recompute import norm_then
from magvit_fast.nn.stream import StreamState
from magvit_fast.nn.style import CAUSAL, LayerStyle
from magvit_fast.ops._checks import autocast_dtype


class ResBlock3d(nn.Module):
    """Norm, SiLU, conv 3x3x3, twice, plus a shortcut of the raw input.

    The shortcut is a convolution only where the width changes: 1x1x1, or 3x3x3 with
    `conv_shortcut`. The convolutions have a bias where `bias` says so (VQ-GAN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv_shortcut: bool = False,
        bias: bool = False,
        style: LayerStyle = CAUSAL,
    ) -> None:
        super().__init__()
        self.norm1 = style.norm(in_channels)
        self.conv1 = style.conv(in_channels, out_channels, bias=bias)
        self.norm2 = style.norm(out_channels)
        self.conv2 = style.conv(out_channels, out_channels, bias=bias)
        self.shortcut = (
            style.conv(in_channels, out_channels, 3 if conv_shortcut else 1, bias=bias)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """[B, C_in, T, H, W] -> [B, C_out, T, H, W]."""
        y = norm_then(self.norm1, self.conv1, x, state)
        skip = x if self.shortcut is None else self.shortcut(x, state)
        # Autocast would round the sum of all blocks to its own dtype at every block.
        inside = autocast_dtype(x) is None
        added = skip if inside else None
        if torch.is_grad_enabled():
            y = norm_then(self.norm2, self.conv2, y, state, added)
        else:  # by name, so that what the norm has read is free before the convolution
            y = self.norm2(y)
            y = self.conv2(y, state, added)
        out: Tensor = y if inside else skip + y
        return out


class FrameAttention(nn.Module):
    """Group norm, single-head attention among the positions of each frame, added to the input."""

    def __init__(self, channels: int, *, norm_groups: int = MAX_GROUPS) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(channels, groups=norm_groups, activation=None)
        self.attention = SelfAttention(channels, 1)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """x [B, C, T, H, W] -> the same shape. Frames do not see each other: `state` plays no part."""
        b, c, t, h, w = x.shape
        frames = self.norm(x).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
        y: Tensor = self.attention(frames)
        return x + y.view(b, t, h, w, c).permute(0, 4, 1, 2, 3)
