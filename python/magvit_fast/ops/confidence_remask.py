"""confidence_remask: reference only for now (its noise is torch's until the Philox streams arrive)."""

from __future__ import annotations

import torch
from torch import Tensor


def confidence_remask(logits: Tensor, tokens: Tensor, unknown: Tensor, *, num_unknown: int | Tensor,
                      temperature: float = 1.0, choice_temperature: float = 0.0, seed: int = 0, step: int = 0,
                      noise: tuple[Tensor, Tensor] | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    b, n, g, v = logits.shape
    if noise is None:
        gen = torch.Generator(device=logits.device).manual_seed(seed * 1000003 + step)
        def gumbel(*shape: int) -> Tensor:
            u = torch.rand(*shape, generator=gen, device=logits.device).clamp_(1e-7, 1 - 1e-7)
            return -torch.log(-torch.log(u))
        noise = (gumbel(b, n, g, v), gumbel(b, n))
    x = logits.float()
    picks = (x / temperature + noise[0] if temperature > 0 else x).argmax(-1)
    confidence = x.log_softmax(-1).gather(-1, picks.unsqueeze(-1)).squeeze(-1).sum(-1) + choice_temperature * noise[1]
    bits = v.bit_length() - 1
    sampled = (picks << (bits * torch.arange(g, device=logits.device))).sum(-1)
    new_tokens = torch.where(unknown, sampled, tokens)
    order = torch.where(unknown, confidence, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=logits.device).expand(b, n))
    count = torch.as_tensor(num_unknown, device=logits.device).reshape(-1, 1)
    return new_tokens, (rank < count) & unknown
