"""lfq_codes: reference only for now."""

from __future__ import annotations

import torch
from torch import Tensor


def lfq_codes(indices: Tensor, num_bits: int, *, channel_dim: int = 1, bit_order: str = "lsb", dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tensor:
    shifts = torch.arange(num_bits, device=indices.device)
    if bit_order == "msb":
        shifts = shifts.flip(0)
    bits = (indices.unsqueeze(-1) >> shifts) & 1
    return (bits * 2 - 1).to(dtype).movedim(-1, channel_dim)
