"""The blocks of the tokenizers: the residual block of all of them, the attention block of VQ-GAN."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from magvit_fast.nn.attention import SelfAttention
from magvit_fast.nn.norm import MAX_GROUPS, FollowingNorm, GroupNormSiLU
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

    @property
    def first_norm(self) -> nn.Module:
        """The norm that reads the block's input."""
        return self.norm1

    def forward(
        self,
        x: Tensor,
        state: StreamState | None = None,
        statistics: Tensor | None = None,
        following: FollowingNorm | None = None,
    ) -> Tensor:
        """[B, C_in, T, H, W] -> [B, C_out, T, H, W].

        `statistics` are those of x for norm1, where there are any; `following` may get the result's.
        """
        between = FollowingNorm(self.norm2)
        y = norm_then(self.norm1, self.conv1, x, state, None, between, statistics=statistics)
        skip = x if self.shortcut is None else self.shortcut(x, state)
        # Autocast would round the sum of all blocks to its own dtype at every block.
        inside = autocast_dtype(x) is None
        last = (state, skip, following) if inside else (state,)
        if torch.is_grad_enabled():
            y = norm_then(self.norm2, self.conv2, y, *last, statistics=between.statistics)
        else:  # by name, so that what the norm has read is free before the convolution
            y = self.norm2(y, between.statistics)
            y = self.conv2(y, *last)
        out: Tensor = y if inside else skip + y
        return out


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    state: StreamState | None,
    following: FollowingNorm | None = None,
) -> Tensor:
    """Blocks (residual, attention) one after another, each leaving the next one's norm what it can."""
    chain = list(blocks)
    statistics: Tensor | None = None
    for i, block in enumerate(chain):
        after = following
        if i + 1 < len(chain):
            norm = chain[i + 1].first_norm
            assert isinstance(norm, GroupNormSiLU)
            after = FollowingNorm(norm)
        x = block(x, state, statistics, after)
        statistics = None if after is None else after.statistics
    return x


class FrameAttention(nn.Module):
    """Group norm, single-head attention among the positions of each frame, added to the input."""

    def __init__(self, channels: int, *, norm_groups: int = MAX_GROUPS) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(channels, groups=norm_groups, activation=None)
        self.attention = SelfAttention(channels, 1)

    @property
    def first_norm(self) -> GroupNormSiLU:
        """The norm that reads the block's input."""
        return self.norm

    def forward(
        self,
        x: Tensor,
        state: StreamState | None = None,
        statistics: Tensor | None = None,
        following: FollowingNorm | None = None,
    ) -> Tensor:
        """x [B, C, T, H, W] -> the same shape; `statistics` are those of x, where there are any.

        Frames do not see each other: `state` plays no part. No convolution makes the result, so
        that `following` gets nothing.
        """
        b, c, t, h, w = x.shape
        frames = self.norm(x, statistics).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
        y: Tensor = self.attention(frames)
        return x + y.view(b, t, h, w, c).permute(0, 4, 1, 2, 3)
