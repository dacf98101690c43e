"""The residual block of the MAGVIT-v2 tokenizer."""

from __future__ import annotations

from torch import Tensor, nn

from magvit_fast.nn.conv import CausalConv3d
from magvit_fast.nn.norm import MAX_GROUPS, GroupNormSiLU
from magvit_fast.nn.stream import StreamState


class ResBlock3d(nn.Module):
    """Norm, SiLU, conv 3x3x3, twice, plus a shortcut of the raw input; no convolution has a bias.

    The shortcut is a convolution only where the width changes: 1x1x1, or 3x3x3 with
    `conv_shortcut`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv_shortcut: bool = False,
        norm_groups: int = MAX_GROUPS,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels, groups=norm_groups)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = GroupNormSiLU(out_channels, groups=norm_groups)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, 3 if conv_shortcut else 1, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """[B, C_in, T, H, W] -> [B, C_out, T, H, W]."""
        y = self.conv1(self.norm1(x), state)
        y = self.conv2(self.norm2(y), state)
        skip = x if self.shortcut is None else self.shortcut(x, state)
        out: Tensor = skip + y
        return out
