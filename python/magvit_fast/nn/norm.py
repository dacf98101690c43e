"""Group normalization, per frame or over the clip, plain and adaptive."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.ops._checks import check_choice

NormCondition = Literal["latent", "statistics"]
NORM_CONDITIONS = ("latent", "statistics")

EPS = 1e-6
MAX_GROUPS = 32


def group_count(channels: int, groups: int = MAX_GROUPS) -> int:
    """`groups` groups; with fewer channels each channel is its own (as in Google's port).

    Raises:
        ValueError: groups is below 1, or channels are more than groups but no multiple of them.
    """
    if groups < 1:
        raise ValueError(f"groups: expected 1 or more, got {groups}")
    if channels < 1 or (channels > groups and channels % groups):
        raise ValueError(
            f"channels: expected fewer than {groups} or a multiple of it, got {channels}"
        )
    return min(channels, groups)


class GroupNormSiLU(nn.Module):
    """Group norm over (H, W, C / groups) of each frame, then SiLU unless `activation` is None.

    With `per_frame` False the statistics span time too (MAGVIT); that is not causal.
    `weight` multiplies directly; Google's port stores it as an offset from one (compat.praxis adds
    the one).
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = MAX_GROUPS,
        activation: Literal["silu"] | None = "silu",
        per_frame: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_groups = group_count(channels, groups)
        self.per_frame = per_frame
        self.activation: Literal["silu"] | None = activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, statistics: Tensor | None = None) -> Tensor:
        """x [B, C, T, H, W] -> the same shape. `statistics`: as nn.conv made them of x, if it did."""
        return ops.group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=EPS,
            per_frame=self.per_frame,
            activation=self.activation,
            statistics=statistics,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, num_groups={self.num_groups}, activation={self.activation!r}"


class FollowingNorm:
    """Told to the layer whose result `norm` reads next: what it leaves for it.

    Attributes:
        norm: who asks.
        statistics: of the layer's result, for norm.forward; None where none were made on the way.
    """

    def __init__(self, norm: GroupNormSiLU) -> None:
        self.norm = norm
        self.statistics: Tensor | None = None


def upsample_nearest(x: Tensor, factor: tuple[int, int, int], frames: int) -> Tensor:
    """Repeat [B, C, T', H', W'] by `factor` and keep the last `frames` frames of the result.

    The causal up-samplers drop leading frames; doing that level by level and doing it once at the
    end give the same map from frame to latent slot, so that one call serves any number of levels.
    """
    st, sh, sw = factor
    b, c, t, h, w = x.shape
    tall = x.permute(0, 2, 3, 4, 1).reshape(b, t, 1, h, 1, w, 1, c)
    tall = tall.expand(b, t, st, h, sh, w, sw, c).reshape(b, t * st, h * sh, w * sw, c)
    return tall.permute(0, 4, 1, 2, 3)[:, :, t * st - frames :]


def latent_statistics(latent: Tensor, *, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of [B, D, T, H, W] over its plane, or over the clip too.

    Returns:
        Two tensors [B, D, T or 1, 1, 1]. The deviation is sqrt(v + 1e-6), v the unbiased variance,
        or 0 where there is one position alone.
    """
    axes = (3, 4) if per_frame else (2, 3, 4)
    count = math.prod(latent.shape[axis] for axis in axes)
    variance = latent.var(axes, correction=min(1, max(count - 1, 0)), keepdim=True)
    return latent.mean(axes, keepdim=True), (variance + EPS).sqrt()


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear functions of a condition.

    y = norm(x) * (1 + W_g z + b_g) + (W_b z + b_b); no activation follows (MAGVIT-v2, appendix
    architecture figure; CondNorm of Google's port). With `condition` "latent" z is the latent at the
    same position. The two maps are linear per position, so they are applied at the condition's
    resolution, and the op reads each of their values for a whole block of x: the same values for less
    work and memory.

    With "statistics" (Open-MAGVIT2) the scale takes the latent's deviation for z and the shift its
    mean, each over what the norms span: a slot's plane when `per_frame`, else the clip.
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        *,
        groups: int = MAX_GROUPS,
        per_frame: bool = True,
        condition: NormCondition = "latent",
    ) -> None:
        super().__init__()
        check_choice("condition", condition, NORM_CONDITIONS)
        self.channels = channels
        self.condition_channels = condition_channels
        self.num_groups = group_count(channels, groups)
        self.per_frame = per_frame
        self.condition: NormCondition = condition
        self.scale = nn.Linear(condition_channels, channels)
        self.shift = nn.Linear(condition_channels, channels)
        for linear in (self.scale, self.shift):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, condition: Tensor, factor: tuple[int, int, int] = (1, 1, 1)
    ) -> Tensor:
        """x [B, C, T, H, W], condition [B, D, T', H', W'] -> the shape of x.

        x is the condition's grid repeated by `factor`, less some leading frames.
        """
        mean, deviation = condition, condition
        if self.condition == "statistics":
            mean, deviation = latent_statistics(condition, per_frame=self.per_frame)
        scale = self.scale(deviation.movedim(1, -1)).movedim(-1, 1)
        shift = self.shift(mean.movedim(1, -1)).movedim(-1, 1)
        return ops.group_norm_silu(
            x,
            self.num_groups,
            eps=EPS,
            per_frame=self.per_frame,
            scale=scale,
            shift=shift,
            factor=factor,
            activation=None,
        )
