"""Token embeddings: packed visual tokens as a sum of sub-tables, the MASK vector, and prefix rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magvit_fast import ops


def unpack_subtokens(ids: Tensor, num_subtokens: int, subtoken_size: int) -> Tensor:
    """Split packed ids into sub-tokens: [...] -> [..., G], sub-token g = (ids >> g*log2(V)) & (V-1).

    `subtoken_size` (V) is a power of two. Sub-token 0 holds the least significant bits.
    """
    bits = subtoken_size.bit_length() - 1
    shifts = torch.arange(num_subtokens, device=ids.device) * bits
    return (ids.unsqueeze(-1) >> shifts) & (subtoken_size - 1)


def pack_subtokens(subtokens: Tensor, subtoken_size: int) -> Tensor:
    """The inverse of unpack_subtokens: [..., G] -> [...]."""
    bits = subtoken_size.bit_length() - 1
    shifts = torch.arange(subtokens.shape[-1], device=subtokens.device) * bits
    return (subtokens << shifts).sum(-1)


class TokenEmbedding(nn.Module):
    """Embedding of packed visual tokens through `ops.factorized_embedding`.

    An id of num_subtokens * log2(subtoken_size) bits is embedded as the sum of one row per sub-table; a
    masked position is one vector of its own, whatever its id. A table of G*V rows so stands in for one of
    V**G rows (MAGVIT-v2: 2 x 512 rows for 2**18 codes). G = 1 is the plain table of MAGVIT.
    masked=False leaves the MASK vector out.
    """

    def __init__(
        self, num_subtokens: int, subtoken_size: int, dim: int, *, masked: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_subtokens, subtoken_size, dim))  # [G, V, D]
        self.mask_embedding = nn.Parameter(torch.empty(dim)) if masked else None  # [D]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids int64 [B, N], mask bool [B, N] (True = MASK) -> [B, N, D]."""
        if mask is None:
            return ops.factorized_embedding(ids, self.weight)
        return ops.factorized_embedding(
            ids, self.weight, mask=mask, mask_embedding=self.mask_embedding
        )
