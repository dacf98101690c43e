"""factorized_embedding: reference only for now."""

from __future__ import annotations

import torch
from torch import Tensor


def factorized_embedding(ids: Tensor, weight: Tensor, *, mask: Tensor | None = None, mask_embedding: Tensor | None = None, impl: str = "auto") -> Tensor:
    g, v, _ = weight.shape
    bits = v.bit_length() - 1
    out = sum(torch.nn.functional.embedding((ids >> (i * bits)) & (v - 1), weight[i]) for i in range(g))
    if mask is not None:
        out = torch.where(mask.unsqueeze(-1), mask_embedding, out)
    return out
