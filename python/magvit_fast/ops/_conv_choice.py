"""Which convolutions on the CPU `impl="auto"` leaves to PyTorch, because its own are faster there.

Previous hop: causal_conv3d. Figures: benchmarks/notes/causal_conv3d_cpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magvit_fast import _native

# float32 of a register; below AVX2, where none permutes them, depthwise convolutions alone
_LANES = {"baseline": 2, "avx2": 8, "avx512": 16, "avx512_bf16": 16}
# channels of a group, by (3x3 plane at stride and dilation 1, float32)
_WIDE_GROUP = {(True, True): 16, (True, False): 32, (False, True): 64, (False, False): 64}


def _groups_are_faster(
    weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, gradients: bool
) -> bool:
    """Several groups in a register, or groups wide enough, by Winograd's algorithm earlier."""
    channels = (weight.shape[1], weight.shape[0] // groups)
    if 2 * max(channels) <= _LANES[_native.ISA_LEVELS[_native.isa()]]:
        # Forward alone oneDNN is ahead where little is computed for what is read.
        return gradients or (max(channels) > 1 and max(stride) == 1)
    winograd = weight.shape[3:] == (3, 3) and max(*stride, *dilation) == 1
    return min(channels) >= _WIDE_GROUP[winograd, weight.dtype == torch.float32]


def torch_is_faster(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether oneDNN was measured to beat the native kernel by more than noise on such a layer.

    It must not depend on sizes in time or plane: chunks of a stream take the way of the whole.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.dtype == torch.bfloat16 and _native.isa() < _native.ISA_LEVELS.index("avx512_bf16"):
        return False  # oneDNN widens there, too
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return groups > 1 and not _groups_are_faster(weight, stride, dilation, groups, gradients)
