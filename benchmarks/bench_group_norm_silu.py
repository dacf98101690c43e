"""group_norm_silu against eager PyTorch: F.group_norm and F.silu, frames folded into the batch, in both layouts.

Without gradients PyTorch's SiLU works in place; scale and shift are one addcmul. PyTorch's variance is that of
its own kernel, which is less exact than ours at a large mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench

LAYOUTS = {"torch_contiguous": torch.contiguous_format}
LAYOUTS |= {"torch_channels_last": torch.channels_last_3d, "native": torch.channels_last_3d}


def _upsample(value: Tensor, cell: tuple[int, ...], frames: int) -> Tensor:
    repeated = F.interpolate(value, scale_factor=tuple(float(c) for c in cell), mode="nearest")
    return repeated[:, :, -frames:]


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor, maps: list[Tensor], problem: dict[str, Any]
) -> Tensor:
    b, _, t = x.shape[:3]
    per_frame = not problem.get("clip")
    y = x.transpose(1, 2).flatten(0, 1) if per_frame else x
    y = F.group_norm(y, problem["groups"], weight, bias, 1e-6)
    if per_frame:
        y = y.view(b, t, *y.shape[1:]).transpose(1, 2)
    if maps:
        scale, shift = (_upsample(v, problem["cell"], t) for v in maps)
        y = torch.addcmul(shift, y, 1 + scale)
    if problem.get("activation") == "none":
        return y
    return F.silu(y, inplace=not y.requires_grad)


def _native(
    x: Tensor, weight: Tensor, bias: Tensor, maps: list[Tensor], problem: dict[str, Any]
) -> Tensor:
    scale, shift = maps or (None, None)
    return mf.group_norm_silu(
        x, problem["groups"], weight, bias, per_frame=not problem.get("clip"), scale=scale,
        shift=shift, factor=tuple(problem.get("cell", (1, 1, 1))),
        activation=None if problem.get("activation") == "none" else "silu", impl="native",
    )  # fmt: skip


@pytest.mark.parametrize("impl", list(LAYOUTS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("problem", problems("group_norm_silu", "bench"), ids=lambda p: p["name"])
def test_group_norm_silu(
    benchmark: Any, problem: dict[str, Any], dtype: torch.dtype, backward: bool, impl: str
) -> None:
    b, c, t, h, w = problem["size"]
    layout = LAYOUTS[impl]
    if impl == "native" and problem.get("contiguous"):
        layout = torch.contiguous_format

    def dense(*size: int) -> Tensor:
        value = torch.randn(size).to(dtype).contiguous(memory_format=layout)
        return value.requires_grad_(backward)

    x, dy = dense(b, c, t, h, w), dense(b, c, t, h, w).detach()
    affine = [torch.randn(c).to(dtype).requires_grad_(backward) for _ in range(2)]
    cell = problem.get("cell")
    maps = (
        [dense(b, c, -(-t // cell[0]), h // cell[1], w // cell[2]) for _ in range(2)]
        if cell
        else []
    )
    call = _native if impl == "native" else _torch
    leaves = [x, *affine, *maps]

    def step() -> object:
        y = call(x, *affine, maps, problem)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    run: Callable[[], object] = step
    what = "forward_backward" if backward else "forward"
    benchmark.group = f"group_norm_silu {problem['name']} {str(dtype)[6:]} {what}"
    benchmark.extra_info["impl"] = impl
    if dtype == torch.float32:
        benchmark.extra_info["target"] = problem.get("target")
    benchmark(run)
