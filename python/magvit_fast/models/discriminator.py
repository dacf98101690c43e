"""The 3D discriminator of MAGVIT and MAGVIT-v2: StyleGAN residual blocks that halve t, h and w.

Source: MAGVIT-v2 figure 7 and appendix A.2; block order, padding and flattening as in Google's
released layers. Not causal: all convolutions are zero-padded on both sides.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.nn.conv import SameConv3d
from magvit_fast.nn.resample import average_pool
from magvit_fast.ops._checks import check_tensor

Pooling = Literal["blur", "average"]


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a Discriminator3D. The default is the published one: 61,341,569 parameters.

    clip: (T, H, W) of the videos; the first dense layer fixes it. filters: width f of the first
    layer; every block halves t, h and w (rounding up) and widens to f * multiplier. pooling: "blur"
    (MAGVIT-v2) with a filter of blur_size taps, or "average" (MAGVIT: its L model has this
    config with clip (16, 128, 128), its B model with 64 filters). frame_by_frame: the 2D
    discriminator of images (clips of one frame): kernels 1 x k x k, pooling in space alone.
    """

    clip: tuple[int, int, int] = (17, 128, 128)
    in_channels: int = 3
    filters: int = 128
    channel_multipliers: tuple[int, ...] = (2, 4, 4, 4, 4)
    blur_size: int = 3
    negative_slope: float = 0.2
    pooling: Pooling = "blur"
    frame_by_frame: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", tuple(int(n) for n in self.clip))
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        if len(self.clip) != 3 or min(self.clip) < 1:
            raise ValueError(f"clip: expected three positive ints (T, H, W), got {self.clip}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                "channel_multipliers: expected one or more positive ints, "
                f"got {self.channel_multipliers}"
            )
        if self.pooling not in ("blur", "average"):
            raise ValueError(f"pooling: expected 'blur' or 'average', got {self.pooling!r}")
        for name in ("in_channels", "filters", "blur_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.frame_by_frame and self.clip[0] != 1:
            raise ValueError(
                f"frame_by_frame: expected clips of one frame, got {self.clip[0]} frames"
            )

    @property
    def final_grid(self) -> tuple[int, int, int]:
        """(t, h, w) after all blocks."""
        shrink = 2 ** len(self.channel_multipliers)
        t, h, w = (math.ceil(n / shrink) for n in self.clip)
        return t, h, w

    @property
    def takes_images(self) -> bool:
        """Whether a single image ends on the same grid as a clip, so that both can be judged."""
        return self.final_grid[0] == 1


def _conv(
    config: DiscriminatorConfig,
    channels: int,
    out_channels: int,
    kernel: int = 3,
    *,
    bias: bool = True,
) -> SameConv3d:
    size = (1 if config.frame_by_frame else kernel, kernel, kernel)
    return SameConv3d(channels, out_channels, size, bias=bias)


class DiscriminatorBlock(nn.Module):
    """(main + skip) / sqrt(2); [B, C, T, H, W] -> [B, out, ceil(T/2), ceil(H/2), ceil(W/2)].

    main: conv 3x3x3 (C -> C), LeakyReLU, pooling, conv 3x3x3 (C -> out), LeakyReLU. skip: pooling,
    conv 1x1x1 without bias.
    """

    def __init__(self, channels: int, out_channels: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.conv_first = _conv(config, channels, channels)
        self.conv_last = _conv(config, channels, out_channels)
        self.conv_skip = _conv(config, channels, out_channels, 1, bias=False)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        slope = self.config.negative_slope
        main = F.leaky_relu(self.conv_first(x), slope)
        main = F.leaky_relu(self.conv_last(self._pool(main)), slope)
        skip: Tensor = self.conv_skip(self._pool(x))
        return (main + skip) * math.sqrt(0.5)

    def _pool(self, x: Tensor) -> Tensor:
        if self.config.pooling == "average":
            return average_pool(x, (2, 2, 2))
        size = self.config.blur_size
        pooled = ops.blur_pool3d(x, filter_size=size)
        if self.config.frame_by_frame:
            # the filter's tap on the only frame is taken out again: nothing is blurred in time
            pooled = pooled * (2 ** (size - 1) / math.comb(size - 1, (size - 1) // 2))
        return pooled


class Discriminator3D(PretrainedMixin, nn.Module):
    """Real or generated: [B, C, T, H, W] in [0, 1] -> logits [B, 1]. Twice differentiable (R1)."""

    config_class = DiscriminatorConfig
    config: DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.filters * m for m in (1, *config.channel_multipliers)]
        self.conv_in = _conv(config, config.in_channels, widths[0])
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(width, out, config) for width, out in itertools.pairwise(widths)
        )
        self.conv_out = _conv(config, widths[-1], widths[-1])
        self.dense = nn.Linear(widths[-1] * math.prod(config.final_grid), widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        for layer in (self.dense, self.logit):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, video: Tensor) -> Tensor:
        check_tensor("video", video, floating=True)
        expected = (self.config.in_channels, *self.config.clip)
        shape = list(video.shape[1:])
        if self.config.takes_images and video.dim() == 5 and shape[1] == 1:
            shape[1] = self.config.clip[0]
        if tuple(shape) != expected:
            raise ValueError(
                f"video: expected [B, {', '.join(map(str, expected))}], got {tuple(video.shape)}"
            )
        slope = self.config.negative_slope
        video = video.contiguous(memory_format=torch.channels_last_3d)
        x = F.leaky_relu(self.conv_in(video), slope)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.conv_out(x), slope)
        x = x.permute(0, 2, 3, 4, 1).flatten(1)  # [B, t*h*w*c], the order of the released weights
        logits: Tensor = self.logit(F.leaky_relu(self.dense(x), slope))
        return logits
