"""group_norm_silu: group normalization, affine or adaptive, and SiLU in one op.

Contract
    x [B, C, T, H, W]; the C channels form `num_groups` groups of neighbors. Statistics (biased
    variance, eps under the root) run over (C / num_groups, H, W) of one frame when `per_frame`,
    else over (C / num_groups, T, H, W). Per frame is what keeps MAGVIT-v2 causal; MAGVIT v1 spans
    time.
        y = activation((x - mean) / sqrt(var + eps) * weight + bias)
    `weight`, `bias` [C]. The adaptive form multiplies and adds per position after that:
        y = activation(norm(x) * (1 + scale) + shift),  scale and shift broadcastable to x.
Source
    MAGVIT-v2, appendix architecture figure; "GroupNormSpatial" and "CondNorm" of Google's port.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops._checks import check_int, check_number, check_same, check_tensor

_NO_KERNEL = "this op has no native kernel yet; its reference serves every device"


def _centered(x: Tensor, num_groups: int) -> Tensor:
    """x [N, C, ...] less the mean of its group.

    PyTorch's channels-last kernel takes the variance as E[x^2] - E[x]^2, which loses digits when
    the mean is not small: 4e-5 in float32 at a mean of five deviations. Group norm does not change
    under a shift of its group, so that the mean may be removed first and without a gradient.
    """
    n, channels = x.shape[:2]
    size = channels // num_groups
    mean = x.detach().flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = mean.view(n, num_groups, size).mean(2, keepdim=True)
    mean = mean.expand(n, num_groups, size).reshape(n, channels)
    return x - mean.to(x.dtype).view(n, channels, *[1] * (x.dim() - 2))


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    # A channel stride of one is the channels-last order even where frames were cut off in front.
    layout = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    if per_frame:
        b, _, t = x.shape[:3]
        # [B*T, C, H, W]: a view for channels-last input; PyTorch's channels-last kernel runs then.
        # (torch.group_norm, because F.group_norm refuses a single value per channel.)
        frames = x.transpose(1, 2).flatten(0, 1)
        y = torch.group_norm(_centered(frames, num_groups), num_groups, weight, bias, eps)
        y = y.view(b, t, *y.shape[1:]).transpose(1, 2)
    else:
        y = torch.group_norm(_centered(x, num_groups), num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    y = F.silu(y) if activation == "silu" else y
    return y.contiguous(memory_format=layout)


def _check(
    x: Tensor,
    num_groups: int,
    affine: dict[str, Tensor | None],
    adaptive: dict[str, Tensor | None],
    eps: float,
    activation: str | None,
) -> None:
    check_tensor("x", x, ndim=5, floating=True)
    channels = x.shape[1]
    check_int("num_groups", num_groups)
    check_number("eps", eps, least=0.0)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of x, got {num_groups}"
        )
    for name, value in affine.items():
        if value is not None:
            check_tensor(name, value, ndim=1, floating=True)
            check_same(name, value, "x", x, dtype=False)
            if value.shape[0] != channels:
                raise ValueError(f"{name}: expected shape ({channels},), got {tuple(value.shape)}")
    for name, value in adaptive.items():
        if value is not None:
            check_tensor(name, value, floating=True)
            check_same(name, value, "x", x, dtype=False)
            _check_broadcast(name, value, x)
    if activation not in ("silu", None):
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")


def _check_broadcast(name: str, value: Tensor, x: Tensor) -> None:
    tail = x.shape[x.dim() - value.dim() :]
    fits = value.dim() <= x.dim() and all(
        v in (1, n) for v, n in zip(value.shape, tail, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape broadcastable to x's {tuple(x.shape)}, "
            f"got {tuple(value.shape)}"
        )


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    per_frame: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
    impl: str = "auto",
) -> Tensor:
    """Group norm (per frame or clip-wide), affine and adaptive terms, then SiLU. See the module's
    text.

    Returns a tensor of x's shape, dtype and memory format. Twice differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        NotImplementedError: impl="native" (no kernel yet).
    """
    _check(
        x,
        num_groups,
        {"weight": weight, "bias": bias},
        {"scale": scale, "shift": shift},
        eps,
        activation,
    )
    _native.use_native("group_norm_silu", impl, _NO_KERNEL)
    weight, bias, scale, shift = (
        None if v is None else v.to(x.dtype) for v in (weight, bias, scale, shift)
    )
    return reference(x, num_groups, weight, bias, eps, per_frame, scale, shift, activation)
