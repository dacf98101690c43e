"""Native stand-ins for PyTorch's own modules: same class, same parameters, our kernels inside.

A module is made native by giving it a subclass of its own class, so that `isinstance`, attributes,
hooks, caches kept on the module and state_dict stay what they were. The subclass changes one thing:
`_conv_forward` of a convolution (where PyTorch's module hands over to the functional convolution,
after whatever padding and caching the model's own class does) or `forward` of a group norm. What a
kernel cannot serve at run time (float64, unknown devices, function transforms, export) goes to the
class's own code.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
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


_kernels: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def _kernel(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight with five axes: while it stays the same, the same tensor, as the op keeps its packed form."""
    if weight.dim() == 5 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _five(weight)
    found = _kernels.get(module)
    if (
        found is None
        or (found.data_ptr(), found.dtype) != (weight.data_ptr(), weight.dtype)
        or (found.shape, found.stride()) != (_five(weight).shape, _five(weight).stride())
    ):
        found = _kernels[module] = _five(weight)
    return found


_LOOPED = 16  # more items in a batch than this are left to the op


def by_products(module: Any, x: Tensor) -> bool:
    """Whether a convolution without extent in the plane is a few matrix products on x as it lies.

    In channels-first order a kernel of our own would turn x around twice, which costs as much as these
    convolutions themselves; BLAS reads and writes that order.
    """
    kernel = module.kernel_size
    small = kernel == (1,) * len(kernel) or (len(kernel) == 3 and kernel[1:] == (1, 1))
    return (
        small
        and x.dtype == module.weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() == len(kernel) + 2
        and x.shape[0] <= _LOOPED
        and set(module.stride) == {1}
        and module.groups == 1
        and x.is_contiguous()
        and module.weight.is_contiguous()
        and not any(pads(module))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.get_float32_matmul_precision() == "highest"
    )


def _products(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One matrix product for each tap in time: [C_out, C_in] times [C_in, positions]."""
    taps = weight.flatten(2).permute(2, 0, 1).contiguous()
    step = module.dilation[0] if x.dim() == 5 else 1
    shape = list(x.shape)
    shape[1], shape[2] = weight.shape[0], shape[2] - step * (len(taps) - 1)
    y, plane = _native.in_huge_pages(x.new_empty(shape)), x[0, 0, 0].numel()
    for source, result in zip(x.flatten(2), y.flatten(2), strict=True):
        count = result.shape[1]
        if bias is None:
            torch.mm(taps[0], source[:, :count], out=result)
        else:
            torch.addmm(bias[:, None], taps[0], source[:, :count], out=result)
        for i, tap in enumerate(taps[1:], 1):
            result.addmm_(tap, source[:, i * step * plane : i * step * plane + count])
    return y


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
    kernel = _kernel(module, weight)
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


def taps_apart(module: Any, x: Tensor) -> bool:
    """Whether channels stay alone and no value meets two taps, as in a wavelet of two taps."""
    return (
        module.groups == x.shape[1] == module.weight.shape[0]
        and module.weight.shape[1] == 1
        and x.dim() == module.weight.dim()
        and x.dtype == module.weight.dtype
        and tuple(module.stride) == tuple(module.kernel_size)
        and set(module.dilation) == {1}
        and not any(pads(module))
        and module.weight[0].numel() <= 8
        and min(n // s for n, s in zip(x.shape[2:], module.stride, strict=True)) > 0
    )


def _taps(module: Any, weight: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For every tap: the values of `whole` that meet it, and its factors, one a channel."""
    steps = tuple(module.stride)
    ends = [n // s * s for n, s in zip(whole.shape[2:], steps, strict=True)]
    for number, tap in enumerate(itertools.product(*[range(s) for s in steps])):
        every = [slice(t, end, s) for t, end, s in zip(tap, ends, steps, strict=True)]
        factors = weight[:, 0].flatten(1)[:, number].view(1, -1, *[1] * len(steps))
        yield whole[(slice(None), slice(None), *every)], factors


def _gather_taps(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor | None = None
    for values, factors in _taps(module, weight, x):
        y = values * factors if y is None else torch.addcmul(y, values, factors)
    assert y is not None
    return y if bias is None else y + bias.view(1, -1, *[1] * (x.dim() - 2))


def spread_taps(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transposed convolution of a module whose taps are apart."""
    sizes = [n * s for n, s in zip(x.shape[2:], module.stride, strict=True)]
    y = x.new_empty(*x.shape[:2], *sizes)
    for values, factors in _taps(module, weight, y):
        values.copy_(x * factors)
    return y if bias is None else y + bias.view(1, -1, *[1] * (x.dim() - 2))


def conv_forward(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What nn.Conv1d, nn.Conv2d and nn.Conv3d do in `_conv_forward`; None: not served here and now."""
    axes = weight.dim() - 2
    # Under autocast the op casts both; elsewhere PyTorch's own error says what does not fit.
    alike = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if x.dim() not in (axes + 1, axes + 2) or not served(x) or not alike:
        return None
    if taps_apart(module, x):
        return _gather_taps(module, x, weight, bias)
    if by_products(module, x) and x.shape[2] > module.dilation[0] * (weight.shape[2] - 1):
        return _products(module, x, weight, bias)
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    mode = module.padding_mode
    y = convolve(
        module, batched, weight, bias, padding=pads(module), time_mode=mode, space_mode=mode
    )
    return y if x.dim() == axes + 2 else y.squeeze(0)


class NativeConv:
    """Mixin over nn.Conv1d, nn.Conv2d and nn.Conv3d: `_conv_forward` through ops.causal_conv3d."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = conv_forward(self, x, weight, bias)
        if y is None:
            y = super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        return y


# --- group normalization ----------------------------------------------------------------------
def normalize(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    activation: Literal["silu"] | None,
) -> Tensor | None:  # fmt: skip
    """F.group_norm with an activation; None: not served here and now."""
    if x.dim() not in (3, 4, 5) or not served(x):
        return None
    y = ops.group_norm_silu(
        _five(x), num_groups, weight, bias, eps=eps, per_frame=False, activation=activation
    )
    return y.view_as(x) if x.dim() < 5 else y


class NativeGroupNorm:
    """Mixin over nn.GroupNorm: statistics over all axes behind the channels, as PyTorch's."""

    native_activation: Literal["silu"] | None = None  # "silu" where an nn.SiLU was found to follow

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        y = normalize(
            x, module.num_groups, module.weight, module.bias, module.eps, self.native_activation
        )
        if y is not None:
            return y
        y = super().forward(x)  # type: ignore[misc]
        return F.silu(y) if self.native_activation == "silu" else y


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
