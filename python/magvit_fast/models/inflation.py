"""From a 2D tokenizer to a 3D one: every k x k kernel becomes a k_t x k x k kernel.

Source: MAGVIT section 3.1 and the released code ("central", the default, and "average"), MAGVIT-v2
section 3.2 ("last", for causal convolutions; the paper's "central" inflation changed to the present
frame). Discriminators are not inflated by MAGVIT-v2: they start from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from magvit_fast.nn.resample import Upsample
from magvit_fast.ops._checks import check_choice

InflationMode = Literal["central", "average", "last"]
INFLATION_MODES = ("central", "average", "last")


def inflate_kernel(kernel: Tensor, frames: int, mode: InflationMode = "central") -> Tensor:
    """Kernel [out, in, k, k] or [out, in, 1, k, k] -> [out, in, frames, k, k].

    "central": zeros but for time slice frames // 2, which holds the 2D kernel; a still video is
    then treated frame by frame as before. "average": kernel / frames in every slice. "last": zeros
    but for the last slice, the present frame of a causal convolution.
    """
    check_choice("mode", mode, INFLATION_MODES)
    if kernel.dim() == 4:
        kernel = kernel.unsqueeze(2)
    if kernel.dim() != 5 or kernel.shape[2] != 1:
        raise ValueError(f"kernel: expected [out, in, (1,) k, k], got {tuple(kernel.shape)}")
    if frames < 1:
        raise ValueError(f"frames: expected 1 or more, got {frames}")
    repeated = kernel.expand(-1, -1, frames, -1, -1)
    if mode == "average":
        return repeated / frames
    weights = kernel.new_zeros(frames, 1, 1)
    weights[frames // 2 if mode == "central" else frames - 1] = 1
    return repeated * weights


@torch.no_grad()
def inflate(
    model: nn.Module,
    source: nn.Module | Mapping[str, Tensor],
    mode: InflationMode = "central",
) -> list[str]:
    """Start a 3D model from a 2D one of the same layout, in place.

    Parameters of the same name and shape are copied, kernels of the same widths and size in space
    are inflated, and whatever does not fit keeps its values. A convolution before depth to space
    that makes two frames where the 2D one made one gives the 2D result for both.

    With "last" (or "central" for two-sided convolutions) the causal model so made equals the 2D one
    on clips of one frame: what is padded in front of the first frame meets zeros.

    Args:
        model: the 3D model, for example a MagvitTokenizer.
        source: the 2D model (MagvitConfig.frame_by_frame) or its parameters by the same names.
        mode: see `inflate_kernel`.

    Returns:
        The names of the parameters that kept their values.

    Raises:
        ValueError: unknown mode; or no parameter fits at all (a model of another kind).
    """
    check_choice("mode", mode, INFLATION_MODES)
    given = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    kept: list[str] = []
    parameters = dict(model.named_parameters())
    doubled = _outputs_of_upsamplers(model)
    for name, target in parameters.items():
        value = given.get(name)
        if value is not None and name in doubled and 2 * len(value) == len(target):
            value = torch.cat([value, value])  # the frame's axis is the slowest of the channels
        if value is not None and value.shape == target.shape:
            target.copy_(value)
        elif value is not None and _fits(value, target):
            target.copy_(inflate_kernel(value, target.shape[2], mode))
        else:
            kept.append(name)
    if parameters and len(kept) == len(parameters):
        raise ValueError("source: no parameter has the name and the shape of one of the model's")
    return kept


def _outputs_of_upsamplers(model: nn.Module) -> set[str]:
    """Names of the parameters that make s_t * 4 times the channels, ordered (s_t, 2, 2, C)."""
    layers = [name for name, m in model.named_modules() if isinstance(m, Upsample)]
    return {f"{name}.conv.{part}" for name in layers for part in ("weight", "bias")}


def _fits(kernel: Tensor, target: Tensor) -> bool:
    if kernel.dim() == 4:
        kernel = kernel.unsqueeze(2)
    same = kernel.shape[:2] == target.shape[:2] and kernel.shape[3:] == target.shape[3:]
    return kernel.dim() == target.dim() == 5 and kernel.shape[2] == 1 and same
