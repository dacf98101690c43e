"""What group_norm_silu demands of its arguments.

Next hop: none; ops/group_norm_silu.py asks before every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magvit_fast.ops import _checks


def check(
    x: Tensor,
    num_groups: int,
    affine: dict[str, Tensor | None],
    adaptive: dict[str, Tensor | None],
    factor: Sequence[int],
    activation: str | None,
) -> None:
    channels = x.shape[1]
    _checks.check_int("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of x, got {num_groups}"
        )
    for name, value in affine.items():
        if value is not None:
            _checks.check_tensor(name, value, ndim=1, floating=True)
            _checks.check_same(name, value, "x", x, dtype=False)
            if value.shape[0] != channels:
                raise ValueError(f"{name}: expected shape ({channels},), got {tuple(value.shape)}")
    for name, value in adaptive.items():
        if value is not None:
            _checks.check_tensor(name, value, floating=True)
            _checks.check_same(name, value, "x", x, dtype=False)
            _check_repeats(name, value, x, factor)
    if activation not in ("silu", None):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")


def _check_repeats(name: str, value: Tensor, x: Tensor, factor: Sequence[int]) -> None:
    full = [*x.shape[:2], *(-(-n // f) for n, f in zip(x.shape[2:], factor, strict=True))]
    tail = full[len(full) - value.dim() :]
    whole = all(n % f == 0 for n, f in zip(x.shape[3:], factor[1:], strict=True))
    fits = (
        whole
        and value.dim() <= 5
        and all(v in (1, n) for v, n in zip(value.shape, tail, strict=True))
    )
    if not fits:
        how = f" when repeated by {tuple(factor)}" if max(factor) > 1 else ""
        raise ValueError(
            f"{name}: expected a shape broadcastable to x's {tuple(x.shape)}{how}, "
            f"got {tuple(value.shape)}"
        )


def check_statistics(value: Tensor | None, x: Tensor, num_groups: int, per_frame: bool) -> None:
    if value is None:
        return
    _checks.check_tensor("statistics", value, ndim=3, floating=True)
    _checks.check_same("statistics", value, "x", x, dtype=False)
    shape = (x.shape[0] * (x.shape[2] if per_frame else 1), num_groups, 3)
    if tuple(value.shape) != shape or value.dtype != torch.float32:
        raise ValueError(
            f"statistics: expected float32 of shape {shape}, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
