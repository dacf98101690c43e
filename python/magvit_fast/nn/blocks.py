"""The residual block of the MAGVIT and MAGVIT-v2 tokenizers."""

from __future__ import annotations

from torch import Tensor, nn

from magvit_fast.nn.stream import StreamState
from magvit_fast.nn.style import CAUSAL, LayerStyle


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
        style: LayerStyle = CAUSAL,
    ) -> None:
        super().__init__()
        self.norm1 = style.norm(in_channels)
        self.conv1 = style.conv(in_channels, out_channels, bias=False)
        self.norm2 = style.norm(out_channels)
        self.conv2 = style.conv(out_channels, out_channels, bias=False)
        self.shortcut = (
            style.conv(in_channels, out_channels, 3 if conv_shortcut else 1, bias=False)
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
