"""The post-layer-norm transformer layer of BERT, which MAGVIT and MAGVIT-v2 keep."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast.nn.attention import SelfAttention


class PostNormLayer(nn.Module):
    """One BERT layer: x = LN(x + attention(x)); x = LN(x + MLP(x)). [B, N, D] -> [B, N, D].

    GELU in its tanh approximation; dropout on the output of both branches.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_size: int, *, dropout: float = 0.0, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp_in = nn.Linear(dim, mlp_size)
        self.mlp_out = nn.Linear(mlp_size, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        hidden = F.gelu(self.mlp_in(x), approximate="tanh")
        y: Tensor = self.mlp_norm(x + self.dropout(self.mlp_out(hidden)))
        return y
