"""What the layers of one autoencoder have in common: how far they see in time, and how they start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from magvit_fast.nn.conv import CausalConv3d, SameConv3d, SamePadMode
from magvit_fast.nn.norm import MAX_GROUPS, AdaptiveGroupNorm, GroupNormSiLU, NormCondition
from magvit_fast.ops.causal_conv3d import PadMode


@dataclass(frozen=True)
class LayerStyle:
    """Makes convolutions and norms of one kind. The default is MAGVIT-v2's.

    causal: a layer sees the present frame and the ones before it, and norms are per frame.
        Otherwise it looks both ways in time and the norms' statistics span the clip (MAGVIT).
    frame_by_frame: kernels 1 x k x k and norms per frame, causal or not: the 2D networks.
    pad_mode: of time and space; "circular" for two-sided convolutions alone.
    norm_groups: groups of every norm (each channel its own where there are fewer).
    init: of the two-sided convolutions' weights, see SameConv3d.
    clip_norms: norms span the clip although convolutions are causal (Open-MAGVIT2).
    """

    causal: bool = True
    frame_by_frame: bool = False
    pad_mode: SamePadMode = "replicate"
    norm_groups: int = MAX_GROUPS
    init: Literal["xavier", "lecun"] = "xavier"
    clip_norms: bool = False

    @property
    def per_frame(self) -> bool:
        """Whether norms take the statistics of each frame by itself."""
        return self.frame_by_frame or (self.causal and not self.clip_norms)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        *,
        bias: bool = True,
    ) -> CausalConv3d | SameConv3d:
        """A convolution of `kernel` taps along each axis that it sees."""
        size = (1 if self.frame_by_frame else kernel, kernel, kernel)
        if self.causal:
            mode = cast(PadMode, self.pad_mode)
            return CausalConv3d(
                in_channels,
                out_channels,
                size,
                stride,
                bias=bias,
                time_mode=mode,
                space_mode=mode,
            )
        return SameConv3d(
            in_channels,
            out_channels,
            size,
            stride,
            bias=bias,
            pad_mode=self.pad_mode,
            init=self.init,
        )

    def norm(self, channels: int) -> GroupNormSiLU:
        """Group norm and SiLU."""
        return GroupNormSiLU(channels, groups=self.norm_groups, per_frame=self.per_frame)

    def adaptive_norm(
        self, channels: int, condition_channels: int, condition: NormCondition = "latent"
    ) -> AdaptiveGroupNorm:
        """Group norm whose scale and shift come from the latent."""
        return AdaptiveGroupNorm(
            channels,
            condition_channels,
            groups=self.norm_groups,
            per_frame=self.per_frame,
            condition=condition,
        )


CAUSAL = LayerStyle()
TWO_SIDED = LayerStyle(causal=False)
