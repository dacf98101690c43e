"""The layers of magvit2-pytorch 0.5.1 on our ops: same constructors, state_dict and numbers.

    from magvit_fast.compat.magvit2_pytorch import CausalConv3d, ResidualUnit, VideoTokenizer

Layers take [B, C, T, H, W]. Where theirs folds frames or pixels into the batch (and copies), these run
one convolution over the five axes. `VideoTokenizer` is the package's own class with its modules
patched; `load_magvit2_pytorch` fills one from a checkpoint. Up-sampling splits channels as (C, 2, 2),
channel slowest; our depth_to_space3d wants it fastest, so the rows of the weight are read in that
order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.compat._files import key_faults, read_checkpoint, shapes_of, tensors_of
from magvit_fast.compat.patch import patch
from magvit_fast.errors import FileFormatError, MissingExtraError

Kernel = int | tuple[int, int, int]


def _time_mode(pad_mode: str, argument: str = "pad_mode") -> str:
    """Names of F.pad as ours."""
    names = {"constant": "zeros", "replicate": "replicate", "reflect": "reflect"}
    if pad_mode not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {pad_mode!r}")
    return names[pad_mode]


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame: time is padded in front, the plane on both sides.

    One pad_mode serves all axes; clips with no more frames than the padding in time are padded with
    zeros on all axes, whatever the mode (so do theirs). The stride applies to time alone and takes
    stride - 1 frames off the padding. Parameters: conv.weight [C_out, C_in, KT, KH, KW], conv.bias.
    """

    def __init__(
        self,
        chan_in: int,
        chan_out: int,
        kernel_size: Kernel,
        pad_mode: str = "constant",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != 3 or kernel[1] % 2 == 0 or kernel[2] % 2 == 0:
            raise ValueError(f"kernel_size: expected odd sizes over the plane, got {kernel_size}")
        _time_mode(pad_mode)
        dilation, stride = kwargs.pop("dilation", 1), kwargs.pop("stride", 1)
        height, width = kernel[1] // 2, kernel[2] // 2
        self.pad_mode = pad_mode
        self.time_pad = dilation * (kernel[0] - 1) + (1 - stride)
        self.time_causal_padding = (width, width, height, height, self.time_pad, 0)
        self.conv = nn.Conv3d(
            chan_in, chan_out, kernel, stride=(stride, 1, 1), dilation=(dilation, 1, 1), **kwargs
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T, H, W] -> [B, C_out, T', H, W]."""
        mode = _time_mode(self.pad_mode) if self.time_pad < x.shape[2] else "zeros"
        width, _, height, _, front, _ = self.time_causal_padding
        conv = self.conv
        if front < 0 or any(conv.padding) or conv.padding_mode != "zeros":
            pads = self.time_causal_padding  # a padding of conv's own comes on top
            return conv(F.pad(x, pads, mode="constant" if mode == "zeros" else mode))  # type: ignore[no-any-return]
        return ops.causal_conv3d(
            x,
            conv.weight,
            conv.bias,
            stride=conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            padding=(front, 0, height, height, width, width),
            time_mode=mode,  # type: ignore[arg-type]
            space_mode=mode,  # type: ignore[arg-type]
        )


class SqueezeExcite(nn.Module):
    """Gates per frame and channel from an attention-pooled context (global context network)."""

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        dim_hidden_min: int = 16,
        init_bias: float = -10,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        hidden = max(dim_hidden_min, dim_out // 2)
        self.to_k = nn.Conv2d(dim, 1, 1)
        first, last = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim_out, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, init_bias)  # type: ignore[arg-type]
        self.net = nn.Sequential(first, nn.LeakyReLU(0.1), last, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] or [B, C, H, W]; gates times x, of x's shape."""
        frames = x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x
        pixels = frames.flatten(2)  # [N, C, H*W]
        attention = self.to_k(frames).flatten(2).softmax(-1)  # [N, 1, H*W]
        context = (pixels @ attention.transpose(1, 2)).unsqueeze(-1)  # [N, C, 1, 1]
        gates = self.net(context)
        if x.dim() == 5:
            gates = gates.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        return gates * x  # type: ignore[no-any-return]


class Residual(nn.Module):
    """fn(x) + x."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(x, **kwargs) + x  # type: ignore[no-any-return]


def ResidualUnit(dim: int, kernel_size: Kernel, pad_mode: str = "constant") -> Residual:
    """Causal convolution, ELU, 1x1x1 convolution, ELU, squeeze-excitation, around a skip."""
    net = nn.Sequential(
        CausalConv3d(dim, dim, kernel_size, pad_mode=pad_mode),
        nn.ELU(),
        nn.Conv3d(dim, dim, 1),
        nn.ELU(),
        SqueezeExcite(dim),
    )
    patch(net[2])
    return Residual(net)


class Blur(nn.Module):
    """[1, 2, 1] over time, over the plane or over both, borders replicated; keeps the size."""

    f: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor, space_only: bool = False, time_only: bool = False) -> Tensor:
        """x [B, C, T, H, W] or [B, C, H, W]."""
        if space_only and time_only:
            raise ValueError("space_only, time_only: expected at most one of them")
        five = x.unsqueeze(2) if x.dim() == 4 else x
        axes = [not space_only, not time_only, not time_only]
        kernel = torch.ones(1, 1, 1, 1, 1, dtype=x.dtype, device=x.device)
        for axis, used in enumerate(axes):
            if used:
                shape = [1, 1, 1, 1, 1]
                shape[2 + axis] = 3
                kernel = kernel * self.f.to(x.dtype).view(shape) / 4
        channels = five.shape[1]
        pad = [int(used) for used in axes for _ in range(2)]
        y = ops.causal_conv3d(
            five,
            kernel.expand(channels, -1, -1, -1, -1),
            groups=channels,
            padding=tuple(pad),
            time_mode="replicate",
            space_mode="replicate",
        )
        return y.squeeze(2) if x.dim() == 4 else y


class SpatialDownsample2x(nn.Module):
    """Halves height and width by a strided convolution over each frame; `antialias` blurs before it."""

    def __init__(
        self, dim: int, dim_out: int | None = None, kernel_size: int = 3, antialias: bool = False
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if antialias:
            self.maybe_blur = Blur()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, stride=2, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C_out, T, H / 2, W / 2]."""
        if hasattr(self, "maybe_blur"):
            x = self.maybe_blur(x, space_only=True)
        pad = self.conv.kernel_size[0] // 2
        weight = self.conv.weight.unsqueeze(2)
        return ops.causal_conv3d(
            x, weight, self.conv.bias, stride=(1, 2, 2), padding=(0, 0, pad, pad, pad, pad)
        )


class TimeDownsample2x(nn.Module):
    """Halves time by a strided causal convolution at each pixel; `antialias` blurs before it."""

    def __init__(
        self, dim: int, dim_out: int | None = None, kernel_size: int = 3, antialias: bool = False
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if antialias:
            self.maybe_blur = Blur()
        self.time_causal_padding = (kernel_size - 1, 0)
        self.conv = nn.Conv1d(dim, dim_out, kernel_size, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C_out, ceil(T / 2), H, W]."""
        if hasattr(self, "maybe_blur"):
            x = self.maybe_blur(x, time_only=True)
        weight = self.conv.weight[..., None, None]
        pads = (self.time_causal_padding[0], 0, 0, 0, 0, 0)
        return ops.causal_conv3d(x, weight, self.conv.bias, stride=(2, 1, 1), padding=pads)


class _Upsample2x(nn.Module):
    """1x1x1 convolution to the channels of all positions of a block, SiLU, channels to positions."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.net = nn.Sequential(conv)  # the parameters; a place in it is part of their names
        block = factor[0] * factor[1] * factor[2]
        with torch.no_grad():
            start = nn.init.kaiming_uniform_(torch.empty(conv.weight[::block].shape))
            conv.weight.copy_(start.repeat_interleave(block, 0))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C_out, T * factor, ...]."""
        conv: Any = self.net[0]
        block = self.factor[0] * self.factor[1] * self.factor[2]

        def block_first(rows: Tensor) -> Tensor:
            return rows.view(-1, block, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)

        weight = block_first(conv.weight.flatten(1))[..., None, None, None]
        y = ops.causal_conv3d(x, weight, block_first(conv.bias))
        return ops.depth_to_space3d(F.silu(y), self.factor)


class SpatialUpsample2x(_Upsample2x):
    """Doubles height and width."""

    def __init__(self, dim: int, dim_out: int | None = None) -> None:
        super().__init__(nn.Conv2d(dim, (dim if dim_out is None else dim_out) * 4, 1), (1, 2, 2))


class TimeUpsample2x(_Upsample2x):
    """Doubles time."""

    def __init__(self, dim: int, dim_out: int | None = None) -> None:
        super().__init__(nn.Conv1d(dim, (dim if dim_out is None else dim_out) * 2, 1), (2, 1, 1))


def VideoTokenizer(*args: Any, **kwargs: Any) -> nn.Module:
    """magvit2_pytorch.VideoTokenizer with these arguments, patched to run our kernels.

    Raises MissingExtraError without the package.
    """
    model = _peer(*args, **kwargs)
    patch(model)
    return model


def _peer(*args: Any, **kwargs: Any) -> nn.Module:
    try:
        from magvit2_pytorch import VideoTokenizer as Peer
    except ImportError as error:
        raise MissingExtraError("magvit2-pytorch", "compat", "VideoTokenizer") from error
    model: nn.Module = Peer(*args, **kwargs)
    return model


def load_magvit2_pytorch(path: str | os.PathLike[str], **arguments: Any) -> nn.Module:
    """A checkpoint of magvit2-pytorch as the package's own VideoTokenizer, on our kernels.

    Its network (a first convolution of 7x7x7, ELU, squeeze-excitation, RMS norms, attention, and
    neither group nor adaptive norms) is none that a MagvitV2Tokenizer can be, so that the result is
    of the package's class: encode, decode, tokenize and training are its own.

    Args:
        path: what `VideoTokenizer.save` wrote, or a .safetensors file or torch.save of a state_dict.
        arguments: those that the tokenizer was made with (image_size, layers, ...). The file holds
            them as a pickle, which could run anything: it is never opened.

    Returns:
        The model in evaluation mode, on the CPU, patched.

    Raises:
        FileFormatError: the file is missing, damaged or refused by torch's restricted reader, or does
            not fit `arguments`: every key that is missing, superfluous or of a wrong shape is named.
        MissingExtraError: without the package.
    """
    content = read_checkpoint(path)
    if isinstance(content, Mapping):
        content = content.get("model_state_dict", content)
    model = _peer(**arguments)
    try:
        state = tensors_of(content, "model_state_dict")
        if faults := key_faults(shapes_of(state), shapes_of(model.state_dict())):
            raise ValueError(f"does not fit these arguments: {'; '.join(faults)}")
    except ValueError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    model.load_state_dict(state)
    patch(model)
    return model.eval()
