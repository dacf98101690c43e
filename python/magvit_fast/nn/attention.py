"""Multi-head self-attention over torch's scaled_dot_product_attention, bidirectional or causal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of one attention layer for the positions so far: causal decoding's memory.

    Room for `capacity` positions is reserved at the first append, in the dtype and on the device of what
    comes then: 2 * capacity * D numbers a sample.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, heads, n, D / heads] of the next n positions -> those of all positions so far (views)."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: expected at most {self.capacity} positions, got {end}")
        if self._keys is None or self._values is None:
            room = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(room), values.new_empty(room)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class SelfAttention(nn.Module):
    """Multi-head self-attention: [B, N, D] -> [B, N, D].

    Query, key and value come from one fused projection of 3*D rows (in that order); all projections have a
    bias, as in BERT. `dropout` acts on the attention probabilities while training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the width {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, causal: bool = False, cache: KeyValueCache | None = None
    ) -> Tensor:
        """causal: a position sees itself and those before it, else every position sees every other.
        cache: x holds the positions after those in the cache, which it sees too; x's own are added."""
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        before = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(k, v)
        visible = None
        if causal and before and n > 1:  # torch's is_causal aligns with the first key, not the last
            visible = torch.ones(n, before + n, dtype=torch.bool, device=x.device).tril(before)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and not before and n > 1,
        )
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, n, d))
        return out
