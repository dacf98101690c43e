"""Argument checks that all ops share. Messages name the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magvit_fast import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_tensor(
    name: str, x: object, *, ndim: int | None = None, floating: bool = False
) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if ndim is not None and x.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")
    if floating and x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    return x


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} (that of {other_name}), got {x.device}"
        )
    if dtype and x.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected dtype {other.dtype} (that of {other_name}), got {x.dtype}"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_int(name: str, value: object, *, least: int | None = None) -> int:
    """`value` as an int. A float is refused even where it is whole: it may be a slip."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
    return int(value)


def check_number(name: str, value: object, *, least: float = -math.inf) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    number = float(value)
    # Comparisons alone: the tracer of torch.compile knows them for numbers that it keeps open.
    if not (-math.inf < number < math.inf and number >= least):
        bound = "" if least == -math.inf else f", {least:g} or more"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return number


def triple(name: str, value: int | Sequence[int], *, least: int = 1) -> tuple[int, int, int]:
    if type(value) is int and value >= least:  # the usual case: small convolutions feel every step
        return value, value, value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * 3
    integers = not any(isinstance(v, bool) or not isinstance(v, numbers.Integral) for v in values)
    if not integers or len(values) != 3 or min(values) < least:
        kind = ValueError if integers else TypeError
        raise kind(f"{name}: expected an int or three ints, each >= {least}, got {value!r}")
    return int(values[0]), int(values[1]), int(values[2])


def channel_axis(x: Tensor, channel_dim: int) -> int:
    check_int("channel_dim", channel_dim)
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"channel_dim: {channel_dim} is out of range for shape {tuple(x.shape)}")
    return channel_dim % x.dim()


def values_can_be_read(x: Tensor) -> bool:
    """Whether a check may look at x's values: not while tracing or capturing, where there are none."""
    if torch.compiler.is_compiling() or x.is_meta or not x.numel():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for a matrix-product-like op on x's device, or None."""
    kind = x.device.type
    if x.dtype == torch.float64 or x.is_meta:  # meta: the device type without autocast
        return None
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Full precision for a reference that is exact only there. Devices without autocast (meta) need nothing."""
    if x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def no_bad_position(device: torch.device) -> Tensor:
    """What a kernel's `bad` argument points to: -1, the largest number to an unsigned minimum."""
    return torch.full((1,), -1, dtype=torch.int64, device=device)


def first_bad_position(bad: Tensor) -> int | None:
    """The position that a kernel complained of, if it did and if reading that costs no waiting.

    On CUDA that would stop the host until the device has caught up, so there it is done only with
    MAGVIT_FAST_SYNC=1; the kernel has marked the position in its result in any case.
    """
    if bad.is_cuda and (not _native.SYNC or torch.cuda.is_current_stream_capturing()):
        return None
    position = int(bad)
    return None if position < 0 else position


def unravel(position: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for n in reversed(shape):
        index.append(position % n)
        position //= n
    return tuple(reversed(index))


def under_autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The floating tensors among them in autocast's dtype; whatever else came is left to the checks."""
    tensors = (x, *others)
    if not isinstance(x, Tensor) or (dtype := autocast_dtype(x)) is None:
        return tensors
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )


def runs_cpu_kernels(x: Tensor) -> bool:
    """Whether an op that is not told otherwise runs its CPU kernel on x."""
    obstacle = _native.native_dtype_obstacle(x.dtype) or _native.missing_core(x.device)
    return x.device.type == "cpu" and _native.use_native("auto", "auto", obstacle)
