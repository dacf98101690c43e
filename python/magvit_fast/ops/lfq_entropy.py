"""lfq_entropy: reference only for now."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast.ops._sync import mean_over_processes


def _half(log_plus: Tensor, log_minus: Tensor) -> Tensor:
    """[N, d] bit log-probabilities -> [N, 2**d] code probabilities, bit 0 least significant."""
    table = torch.zeros(log_plus.shape[0], 1, dtype=log_plus.dtype, device=log_plus.device)
    for i in range(log_plus.shape[1]):
        table = torch.cat([table + log_minus[:, i : i + 1], table + log_plus[:, i : i + 1]], dim=1)
    return table.exp()


def lfq_entropy(z: Tensor, *, channel_dim: int = 1, inv_temperature: float = 100.0, eps: float = 0.0,
                log_guard: str = "shift", mask: Tensor | None = None, sync: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    flat = z.movedim(channel_dim, -1)
    flat = flat[mask] if mask is not None else flat.reshape(-1, z.shape[channel_dim])
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()
    a = 4.0 * inv_temperature * flat
    lp, lm = F.logsigmoid(a), F.logsigmoid(-a)
    per_sample = -(lp.exp() * lp + lm.exp() * lm).sum(-1).mean()
    d = flat.shape[1]
    lo = d // 2
    probs = _half(lp[:, lo:], lm[:, lo:]).T @ _half(lp[:, :lo], lm[:, :lo]) / flat.shape[0]
    if sync:
        probs = mean_over_processes(probs)
    if eps > 0:
        guarded = probs + eps if log_guard == "shift" else probs.clamp(min=eps)
        codebook = -(probs * guarded.log()).sum()
    else:
        # a code whose probability underflows to 0 must not send log(0) * 0 = NaN back
        codebook = -(probs * probs.clamp(min=1e-37).log()).sum()
    return per_sample, codebook
