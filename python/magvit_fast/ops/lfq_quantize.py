"""lfq_quantize: reference only for now."""

from __future__ import annotations

import torch
from torch import Tensor


def lfq_quantize(z: Tensor, *, channel_dim: int = 1, bit_order: str = "lsb", impl: str = "auto") -> tuple[Tensor, Tensor]:
    positive = z > 0
    sign = torch.where(positive, 1.0, -1.0).to(z.dtype)
    quantized = z + (sign - z).detach() if z.requires_grad else sign
    d = z.shape[channel_dim]
    powers = 2 ** torch.arange(d, device=z.device)
    if bit_order == "msb":
        powers = powers.flip(0)
    indices = (positive.movedim(channel_dim, -1) * powers).sum(-1)
    return quantized, indices
