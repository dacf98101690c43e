"""3D convolutions as layers: causal, with a memory for streaming, and two-sided."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.nn.norm import EPS, FollowingNorm
from magvit_fast.nn.stream import StreamState
from magvit_fast.ops._checks import triple
from magvit_fast.ops._conv_fused import causal_conv3d_statistics, causal_conv3d_to_space
from magvit_fast.ops.causal_conv3d import PAD_MODES, PadMode

SamePadMode = Literal["zeros", "replicate", "reflect", "circular"]  # of two-sided convolutions
SAME_PAD_MODES = (*PAD_MODES, "circular")


class _Conv3d(nn.Module):
    """What a convolution can be asked for beside its result; subclasses say how they pad."""

    def _through(
        self,
        convolve: Callable[..., Any],
        x: Tensor,
        state: StreamState | None,
        residual: Tensor | None,
    ) -> Any:
        """convolve(x, weight, bias, ...) with the layer's geometry."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: StreamState | None = None,
        residual: Tensor | None = None,
        following: FollowingNorm | None = None,
    ) -> Tensor:
        """x [B, C_in, T, H, W] -> [B, C_out, ceil(T / s_t), ceil(H / s_h), ceil(W / s_w)].

        `residual`, of the result's shape, is added to it; `following` gets statistics of the result
        where they save that norm a pass. With `state` the frames continue a stream.
        """
        if following is None:
            y: Tensor = self._through(ops.causal_conv3d, x, state, residual)
            return y
        norm = following.norm
        convolve = functools.partial(
            causal_conv3d_statistics,
            num_groups=norm.num_groups,
            per_frame=norm.per_frame,
            eps=EPS,
        )
        y, following.statistics = self._through(convolve, x, state, residual)
        return y

    def to_space(
        self,
        x: Tensor,
        factor: tuple[int, int, int],
        drop_first: int,
        state: StreamState | None = None,
    ) -> Tensor:
        """depth_to_space3d(forward(x, state), factor), in one kernel where there is one."""
        convolve = functools.partial(causal_conv3d_to_space, factor=factor, drop_first=drop_first)
        y: Tensor = self._through(convolve, x, state, None)
        return y


class CausalConv3d(_Conv3d):
    """3D convolution that sees the present frame and the ones before it (MAGVIT-v2, section 3.2).

    Time is padded in front only, by kernel - 1 frames; space by (k - 1) // 2 before and k // 2
    after; border values are repeated ("replicate", as in Google's port) unless told otherwise.
    Output length is ceil(n / stride) on every axis. Of a stream the first chunk has 1 (mod s_t)
    frames, later ones a multiple of s_t.

    Args:
        in_channels, out_channels: widths.
        kernel_size, stride: an int or three ints (t, h, w). The kernel may not be shorter than the
            stride in time.
        bias: whether a bias is added.
        time_mode, space_mode: "zeros" | "replicate" | "reflect".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        time_mode: PadMode = "replicate",
        space_mode: PadMode = "replicate",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple("kernel_size", kernel_size)
        self.stride = triple("stride", stride)
        if self.kernel_size[0] < self.stride[0]:
            raise ValueError(
                f"kernel_size: expected at least the stride {self.stride[0]} in time, "
                f"got {self.kernel_size[0]}"
            )
        self.time_mode: PadMode = time_mode
        self.space_mode: PadMode = space_mode
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weight and zero bias, the defaults of Google's port."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _through(
        self,
        convolve: Callable[..., Any],
        x: Tensor,
        state: StreamState | None,
        residual: Tensor | None,
    ) -> Any:
        history, padding = None, None
        if state is not None:
            history = state.history(self)
            padding = self._continuing_padding() if state.started else None
        added = {} if residual is None else {"residual": residual}
        y = convolve(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            time_mode=self.time_mode,
            space_mode=self.space_mode,
            history=history,
            **added,
        )
        if state is not None:
            self._remember(x, history, state)
        return y

    def _remember(self, x: Tensor, history: Tensor | None, state: StreamState) -> None:
        keep = self.kernel_size[0] - self.stride[0]
        if keep == 0:
            return
        if history is not None and x.shape[2] < keep:
            x = torch.cat([history.to(x.dtype), x], dim=2)
        state.remember(self, x[:, :, -keep:])

    def _continuing_padding(self) -> tuple[int, int, int, int, int, int]:
        # The first window ends at the first frame of the video; from then on windows end at the
        # last of every s_t frames, so that the first window of a continuing chunk reaches k_t - s_t
        # frames back.
        (kt, kh, kw), st = self.kernel_size, self.stride[0]
        return kt - st, 0, (kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, bias={self.bias is not None}"
        )


class SameConv3d(_Conv3d):
    """3D convolution padded on both sides, so that time is seen both ways (MAGVIT; discriminators).

    With pad_mode "zeros" the padding is TensorFlow's SAME rule, which depends on the length of the
    axis where the stride is above one; with the other modes it is (k - 1) // 2 before and k // 2
    after. Both give ceil(n / stride) outputs for odd kernels of stride 1 or even ones of
    stride 2. A stream can pass only where every frame is seen by itself: one tap in time; with more,
    a `state` raises NotImplementedError.

    Args:
        in_channels, out_channels: widths.
        kernel_size, stride: an int or three ints (t, h, w).
        bias: whether a bias is added; it starts at zero.
        pad_mode: of time and space. "reflect" needs axes longer than the padding; "circular" goes on
            at the other end.
        init: "xavier" (uniform; the discriminators) or "lecun" (normal of variance 1 / fan-in, cut
            at two deviations; flax's default, used by MAGVIT's tokenizer).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        pad_mode: SamePadMode = "zeros",
        init: Literal["xavier", "lecun"] = "xavier",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple("kernel_size", kernel_size)
        self.stride = triple("stride", stride)
        self.pad_mode: SamePadMode = pad_mode
        self.init: Literal["xavier", "lecun"] = init
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "lecun":
            fan_in = self.in_channels * math.prod(self.kernel_size)
            # A unit normal cut at two deviations has the deviation 0.8796...
            std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _through(
        self,
        convolve: Callable[..., Any],
        x: Tensor,
        state: StreamState | None,
        residual: Tensor | None,
    ) -> Any:
        if state is not None and self.kernel_size[0] > 1:
            raise NotImplementedError(
                f"state: a two-sided convolution of {self.kernel_size[0]} frames cannot stream"
            )
        padding: list[int] = []
        for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            if self.pad_mode == "zeros":
                total = max((-(-n // s) - 1) * s + k - n, 0)
                padding += [total // 2, total - total // 2]
            else:
                padding += [(k - 1) // 2, k // 2]
        mode = self.pad_mode
        if mode == "circular":  # no mode of the op: padded first
            x = F.pad(x, (*padding[4:], *padding[2:4], *padding[:2]), mode="circular")
            padding, mode = [0] * 6, "zeros"
        added = {} if residual is None else {"residual": residual}
        return convolve(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            time_mode=mode,
            space_mode=mode,
            **added,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, bias={self.bias is not None}, pad_mode={self.pad_mode!r}"
        )
