"""Routing: convolutions and group norms that a module calls as functions.

Some modules compute with F.conv3d or F.group_norm themselves: wavelets with fixed filters, convolutions
whose weights are made on the way, norms that fold frames into the batch first. Such a module's own forward
runs as it is under a torch function mode, which hands these calls, whatever their arguments, to our kernels.
So nothing about the module needs to be known.

Next hop: native.conv_forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from magvit_fast.compat import native

FUNCTIONS = frozenset(f"conv{how}{axes}d" for how in ("", "_transpose") for axes in (1, 2, 3))


class _Call:
    """The arguments of a functional convolution by the names that a module has for them."""

    padding_mode = "zeros"

    def __init__(
        self, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> None:
        self.weight, self.groups = weight, groups
        self.kernel_size = tuple(weight.shape[2:])
        self.stride, self.dilation = self._each(stride), self._each(dilation)
        self.padding = padding if isinstance(padding, str) else self._each(padding)

    def _each(self, value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(self.kernel_size) if len(values) == 1 else values


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor | None:  # fmt: skip
    call = _Call(weight, stride, padding, dilation, groups)
    return native.conv_forward(call, input, weight, bias)


def _conv_transpose(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor | None:  # fmt: skip
    call = _Call(weight, stride, padding, dilation, groups)
    if any(call._each(output_padding)) or not native.taps_apart(call, input):
        return None
    return native.spread_taps(call, input, weight, bias)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    return native.normalize(input, num_groups, weight, bias, eps, None)


_ROUTES: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.conv_transpose1d: _conv_transpose,
    torch.conv_transpose2d: _conv_transpose,
    torch.conv_transpose3d: _conv_transpose,
    F.group_norm: _group_norm,
}


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        route = _ROUTES.get(func)
        result = None if route is None else route(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


class Routed:
    """Mixin over any module: its own forward, with functional convolutions and group norms on our kernels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _Mode():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def calls_functions(module: nn.Module) -> bool:
    """Whether the code of a third-party module's class names a functional convolution."""
    for parent in type(module).__mro__:
        if parent is nn.Module or parent.__module__.startswith("torch."):
            continue
        for method in vars(parent).values():
            code = getattr(method, "__code__", None)
            found = FUNCTIONS.intersection(_names(code)) if code is not None else ()
            if any(not hasattr(module, name) for name in found):
                return True
    return False
