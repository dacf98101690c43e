"""Transformer layers: BERT's post-norm one (MAGVIT, MAGVIT-v2) and the pre-norm one (MaskViT)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast.nn.attention import KeyValueCache, SelfAttention


class PostNormLayer(nn.Module):
    """One BERT layer: x = LN(x + attention(x)); x = LN(x + MLP(x)). [B, N, D] -> [B, N, D].

    GELU in its tanh approximation; dropout on the output of both branches. causal, cache: see
    SelfAttention.
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

    def forward(
        self, x: Tensor, *, causal: bool = False, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, causal=causal, cache=cache)))
        hidden = F.gelu(self.mlp_in(x), approximate="tanh")
        y: Tensor = self.mlp_norm(x + self.dropout(self.mlp_out(hidden)))
        return y


class PreNormLayer(nn.Module):
    """One pre-norm layer: x = x + attention(LN(x)); x = x + MLP(LN(x)). [B, N, D] -> [B, N, D].

    GELU in its tanh approximation; dropout on the output of both branches. Its matrices hold
    4 D**2 + 2 D mlp_size weights.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_size: int, *, dropout: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.attention = SelfAttention(dim, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp_in = nn.Linear(dim, mlp_size)
        self.mlp_out = nn.Linear(mlp_size, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        y: Tensor = x + self.dropout(self.mlp_out(hidden))
        return y


def init_transformer_(model: nn.Module, std: float) -> None:
    """BERT's start: matrices, tables and mask vectors normal of `std`, cut at two deviations; biases
    0; layer norms (whose names end in "norm") 1 and 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("mask_embedding"):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        elif name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
