"""Native stand-ins for PyTorch's own modules: same class, same parameters, our kernels inside.

A module is made native by giving it a subclass of its own class, so that `isinstance`, attributes,
hooks, caches kept on the module and state_dict stay what they were. The subclass changes one thing:
`_conv_forward` of a convolution (where PyTorch's module hands over to the functional convolution,
after whatever padding and caching the model's own class does) or `forward` of a group norm. What a
kernel cannot serve at run time (float64, unknown devices, function transforms, export) goes to the
class's own code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import _native, ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served(x: Tensor) -> bool:
    """Whether a kernel may take x now."""
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False
    if torch._C._are_functorch_transforms_active():
        return False  # vmap and jvp have no rule for our autograd functions
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return dtype in _DTYPES and _native.missing_core(x.device) is None and x.numel() > 0


# --- convolutions -----------------------------------------------------------------------------
PAD_MODES = ("zeros", "replicate", "reflect")


def _triple(values: tuple[int, ...], fill: int) -> list[int]:
    """Per-axis values of a 1-, 2- or 3-D convolution as (time, height, width).

    The one axis of Conv1d is taken for the width, along which the kernels work on many results at once.
    """
    return [*[fill] * (3 - len(values)), *values]


def _five(x: Tensor) -> Tensor:
    """[N, C, L], [N, C, H, W] or [N, C, T, H, W] as five axes, a view."""
    return x[(slice(None), slice(None), *[None] * (5 - x.dim()))]


def pads(module: nn.Conv3d) -> list[int]:
    """(front, back, top, bottom, left, right); "same" puts the smaller half first as PyTorch does."""
    kernel, dilation = module.kernel_size, module.dilation
    if module.padding == "valid":
        pairs = [(0, 0)] * len(kernel)
    elif module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(p), int(p)) for p in module.padding]
    starts = _triple(tuple(p for p, _ in pairs), 0)
    ends = _triple(tuple(p for _, p in pairs), 0)
    return [p for pair in zip(starts, ends, strict=True) for p in pair]


def _layout(x: Tensor, weight: Tensor) -> Tensor:
    """x in channels-last order if x or the weight is in it: PyTorch's own rule for convolutions."""
    order = torch.channels_last_3d
    if weight.is_contiguous(memory_format=order) and not weight.is_contiguous():
        return x.contiguous(memory_format=order)
    return x


def pad_plane(x: Tensor, sides: list[int], mode: str) -> Tensor:
    """x [T, H, W] with (top, bottom, left, right) more rows and columns."""
    top, bottom, left, right = sides
    how = "constant" if mode == "zeros" else mode
    return F.pad(x[None], (left, right, top, bottom), mode=how)[0]


def convolve(
    module: Any,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **how: Any,
) -> Tensor:
    """x [B, C, ...], of the convolution's number of axes, through ops.causal_conv3d.

    Args:
        module: stride, dilation and groups, and weight and bias where none are given.
        how: padding, time_mode, space_mode and history of the op.
    """
    if weight is None:
        weight, bias = module.weight, module.bias
    kernel = _five(weight)
    y = ops.causal_conv3d(
        _layout(_five(x), kernel),
        kernel,
        bias,
        stride=tuple(_triple(module.stride, 1)),
        dilation=tuple(_triple(module.dilation, 1)),
        groups=module.groups,
        **how,
    )
    if x.dim() == 5:
        return y
    return y[:, :, 0, 0] if x.dim() == 3 else y.squeeze(2)


class NativeConv:
    """Mixin over nn.Conv1d, nn.Conv2d and nn.Conv3d: `_conv_forward` through ops.causal_conv3d."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self
        axes = weight.dim() - 2
        # Under autocast the op casts both; elsewhere PyTorch's own error says what does not fit.
        alike = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
        if x.dim() not in (axes + 1, axes + 2) or not served(x) or not alike:
            own: Tensor = super()._conv_forward(x, weight, bias)  # type: ignore[misc]
            return own
        batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
        mode = module.padding_mode
        y = convolve(
            module, batched, weight, bias, padding=pads(module), time_mode=mode, space_mode=mode
        )
        return y if x.dim() == axes + 2 else y.squeeze(0)


# --- group normalization ----------------------------------------------------------------------
class NativeGroupNorm:
    """Mixin over nn.GroupNorm: statistics over all axes behind the channels, as PyTorch's."""

    native_activation: Literal["silu"] | None = None  # "silu" where an nn.SiLU was found to follow

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if x.dim() not in (3, 4, 5) or not served(x):
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return F.silu(y) if self.native_activation == "silu" else y
        y = ops.group_norm_silu(
            _five(x),
            module.num_groups,
            module.weight,
            module.bias,
            eps=module.eps,
            per_frame=False,
            activation=self.native_activation,
        )
        return y.view_as(x) if x.dim() < 5 else y


class PassedThrough:
    """Mixin over nn.SiLU whose work the group norm in front of it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x


# --- classes ----------------------------------------------------------------------------------
_CLASSES: dict[tuple[type, type], Any] = {}


def native_class(own: type, mixin: type) -> Any:
    """The subclass of the module class `own` with `mixin` in front; the same object for the same pair."""
    if (own, mixin) not in _CLASSES:
        body = {"__reduce_ex__": _reduce, "_magvit_fast_own": own, "__module__": own.__module__}
        _CLASSES[own, mixin] = type(own.__name__, (mixin, own), body)
    return _CLASSES[own, mixin]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Copies stay native; a pickle names the module's own class and the mixin, both importable."""
    made = type(self)
    own = made.__dict__["_magvit_fast_own"]
    return _rebuild, (own, made.__bases__[0]), dict(vars(self))


def _rebuild(own: type[nn.Module], mixin: type) -> nn.Module:
    made = native_class(own, mixin)
    module: nn.Module = made.__new__(made)
    return module


def own_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a native module had before, None for any other module."""
    own: type[nn.Module] | None = type(module).__dict__.get("_magvit_fast_own")
    return own
