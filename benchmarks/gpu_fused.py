"""Rows of the GPU session for group norm, and for convolutions joined with what follows them.

PyTorch's ways are those of a user who keeps channels_last_3d: pad, convolve, normalize, unfold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_row import CHANNELS_LAST, Row

DEVICE, GROUPS = "cuda", 32


def _randn(*size: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(*size, device=DEVICE, dtype=torch.bfloat16) * scale
    return x.contiguous(memory_format=CHANNELS_LAST) if len(size) == 5 else x


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    """Group norm of each frame, and SiLU."""
    frames = x.transpose(1, 2).flatten(0, 1)
    y = F.silu(F.group_norm(frames, GROUPS, weight, bias, 1e-6))
    return y.view(x.shape[0], x.shape[2], *y.shape[1:]).transpose(1, 2)


def _factors(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> list[Tensor]:
    """a and b [B * T, C, 1, 1] with a * x + b = the norm, of statistics [B * T, GROUPS, 3]."""
    mean, rstd = stats[..., 0] + stats[..., 1], stats[..., 2]
    each = x.shape[1] // GROUPS
    a = rstd.repeat_interleave(each, 1) * weight
    b = bias - mean.repeat_interleave(each, 1) * a
    return [v.to(x.dtype).view(*v.shape, 1, 1) for v in (a, b)]


def _torch_ready(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor,
                 a: Tensor, b: Tensor, dy: Tensor) -> Tensor:  # fmt: skip
    """The same with ready statistics, already made into one factor and one term, which is in its favor."""
    frames = x.transpose(1, 2).flatten(0, 1)
    y = F.silu(torch.addcmul(b, frames, a), inplace=True)
    return y.view(x.shape[0], x.shape[2], *y.shape[1:]).transpose(1, 2)


def _both_passes(norm: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in (x, rest[0], rest[1])]
    return torch.autograd.grad(norm(*leaves), leaves, rest[-1])


NORM_SHAPES = (("128 17x128x128", 8), ("128 17x128x128", 1), ("256 17x64x64", 8),
               ("512 5x16x16", 8))  # fmt: skip


def norm_rows(shapes: Sequence[tuple[str, int]] = NORM_SHAPES) -> Iterator[Row]:
    """Statistics and apply; apply alone with statistics that the convolution has left; both passes."""
    import magvit_fast as mf

    for name, batch in shapes:
        channels, size = int(name.split()[0]), [int(n) for n in name.split()[1].split("x")]

        def make(batch: int = batch, channels: int = channels, size: Any = size) -> tuple[Any, ...]:
            x, dy = (_randn(batch, channels, *size) for _ in range(2))
            one = torch.ones(channels, device=DEVICE, dtype=torch.bfloat16)
            zero = torch.zeros_like(one)
            stats = torch.ops.magvit_fast.group_norm_silu(
                x, one, zero, None, None, 1e-6, [1, 1, 1], GROUPS, True, True
            )[1]
            return x, one, zero, stats, *_factors(x, one, zero, stats), dy

        def ours(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
            return mf.group_norm_silu(x, GROUPS, weight, bias, impl="native")

        def ready(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, *rest: Tensor) -> Tensor:
            return mf.group_norm_silu(x, GROUPS, weight, bias, statistics=stats, impl="native")

        label = f"group_norm_silu {name} b{batch} bfloat16"
        moved = 2.0 * batch * channels * size[0] * size[1] * size[2]
        way = {"F.group_norm of frames, F.silu": _torch_norm}
        yield Row(label, make, way, ours, bytes=3 * moved,
                  compiled=lambda compiler: compiler(_torch_norm))  # fmt: skip
        yield Row(f"{label} ready statistics", make, {"addcmul, F.silu": _torch_ready}, ready,
                  bytes=2 * moved, compiled=lambda compiler: compiler(_torch_ready))  # fmt: skip
        yield Row(
            f"{label} both passes", make,
            {"autograd of both": functools.partial(_both_passes, _torch_norm)},
            functools.partial(_both_passes, ours), bytes=8 * moved,
        )  # fmt: skip


def _problem(channels: tuple[int, int], size: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "batch": 8,
        "channels": channels,
        "size": size,
        "kernel": [3, 3, 3],
        "stride": [1, 1, 1],
    }


def joined_rows() -> Iterator[Row]:
    """A convolution and the group norm behind it; a convolution and depth to space."""
    import magvit_fast as mf
    from benchmarks.gpu_rows import _conv_work, _padded, _pads
    from magvit_fast.ops._conv_fused import causal_conv3d_statistics, causal_conv3d_to_space
    from magvit_fast.ops.depth_to_space3d import reference as unfold

    def torch_conv(x: Tensor, w: Tensor, pads: list[int], inner: list[int]) -> Tensor:
        return F.conv3d(_padded(x, pads), w, None, 1, inner)

    def inputs(c_in: int, c_out: int, size: tuple[int, int, int]) -> tuple[Any, ...]:
        w = _randn(c_out, c_in, 3, 3, 3, scale=(27 * c_in) ** -0.5)
        one = torch.ones(c_out, device=DEVICE, dtype=torch.bfloat16)
        return _randn(8, c_in, *size), w.contiguous(), w, one, torch.zeros_like(one)

    for c, size in ((128, (17, 128, 128)), (256, (17, 64, 64)), (512, (5, 16, 16))):
        problem = _problem((c, c), size)
        pads, inner = _pads(problem)
        flops, moved = _conv_work(problem, size, 2)

        def theirs(x: Tensor, w: Tensor, wl: Tensor, one: Tensor, zero: Tensor,
                   pads: list[int] = pads, inner: list[int] = inner) -> Tensor:  # fmt: skip
            return _torch_norm(torch_conv(x, wl, pads, inner), one, zero)

        def ours(x: Tensor, w: Tensor, wl: Tensor, one: Tensor, zero: Tensor) -> Tensor:
            with torch.no_grad():
                y, stats = causal_conv3d_statistics(
                    x, w, num_groups=GROUPS, per_frame=True, eps=1e-6
                )
                return mf.group_norm_silu(y, GROUPS, one, zero, statistics=stats, impl="native")

        yield Row(
            f"causal_conv3d then group_norm_silu {c} {'x'.join(map(str, size))} b8 bfloat16",
            functools.partial(inputs, c, c, size), {"pad, conv, norm, SiLU": theirs}, ours,
            flops=flops, bytes=2 * moved, sm90a=("gather", "fused"),
        )  # fmt: skip

    for c_in, c_out, size, factor in (
        (256, 1024, (17, 64, 64), (1, 2, 2)),
        (512, 4096, (5, 16, 16), (2, 2, 2)),
    ):
        problem = _problem((c_in, c_out), size)
        pads, inner = _pads(problem)
        flops, moved = _conv_work(problem, size, 2)
        drop = factor[0] - 1

        def unfolded(x: Tensor, w: Tensor, wl: Tensor, one: Tensor, zero: Tensor,
                     pads: list[int] = pads, inner: list[int] = inner,
                     factor: tuple[int, int, int] = factor, drop: int = drop) -> Tensor:  # fmt: skip
            return unfold(torch_conv(x, wl, pads, inner), factor, drop)

        def joined(x: Tensor, w: Tensor, wl: Tensor, one: Tensor, zero: Tensor,
                   factor: tuple[int, int, int] = factor, drop: int = drop) -> Tensor:  # fmt: skip
            with torch.no_grad():
                return causal_conv3d_to_space(x, w, factor=factor, drop_first=drop)

        yield Row(
            f"causal_conv3d to space {c_in}->{c_out} {'x'.join(map(str, size))} b8 bfloat16",
            functools.partial(inputs, c_in, c_out, size), {"pad, conv, permute": unfolded}, joined,
            flops=flops, bytes=moved, sm90a=("gather", "fused"),
        )  # fmt: skip
