"""confidence_remask against the plain PyTorch ways of one decoding step.

torch_multinomial: softmax, torch.multinomial, gather of log_softmax, then ranking by topk.
torch_gumbel: Gumbel noise by rand and two logs, argmax, the same ranking: how published code samples.
torch_inverse: one random number a row, found in the cumulative sum of the softmax: the fastest way known to us.
All sample all positions, as fixed-shape PyTorch code does, and draw their own random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from benchmarks.problem_files import problems

pytestmark = pytest.mark.bench


def _gumbel(*shape: int) -> Tensor:
    return torch.rand(*shape).clamp_(min=1e-20).log_().neg_().log_().neg_()


def _torch(
    logits: Tensor, tokens: Tensor, unknown: Tensor, count: int, way: str
) -> tuple[Tensor, Tensor]:
    batch, length, groups, values = logits.shape
    if way == "torch_inverse":
        p = logits.softmax(-1)
        through = p.cumsum(-1)
        share = torch.rand(batch, length, groups, 1) * through[..., -1:]
        picks = torch.searchsorted(through, share, right=True).clamp_(max=values - 1)
        log_picked = p.gather(-1, picks).log_()
    else:
        log_p = logits.log_softmax(-1)
        if way == "torch_multinomial":
            picks = torch.multinomial(log_p.exp().view(-1, values), 1)
            picks = picks.view(batch, length, groups, 1)
        else:
            picks = (logits + _gumbel(*logits.shape)).argmax(-1, keepdim=True)
        log_picked = log_p.gather(-1, picks)
    confidence = log_picked.sum((-1, -2)) + 4.5 * _gumbel(batch, length)
    shifts = (values.bit_length() - 1) * torch.arange(groups)
    sampled = torch.where(unknown, (picks.squeeze(-1) << shifts).sum(-1), tokens)
    lowest = confidence.masked_fill(~unknown, torch.inf).topk(count, largest=False).indices
    still = torch.zeros_like(unknown).scatter_(1, lowest, True) & unknown
    return sampled, still


@pytest.mark.parametrize("impl", ["native", "torch_multinomial", "torch_gumbel", "torch_inverse"])
@pytest.mark.parametrize("problem", problems("confidence_remask", "bench"), ids=lambda p: p["name"])
def test_confidence_remask(benchmark: Any, problem: dict[str, Any], impl: str) -> None:
    batch, length, groups, values = problem["logits"]
    logits = 2 * torch.randn(batch, length, groups, values)
    tokens = torch.randint(0, values**groups, (batch, length))
    unknown = torch.rand(batch, length) < problem["unknown"]
    count = int(length * problem["unknown"]) // 2
    run: Callable[[], object]
    if impl == "native":
        run = lambda: mf.confidence_remask(  # noqa: E731
            logits, tokens, unknown, num_unknown=count, choice_temperature=4.5, impl="native"
        )
    else:
        run = lambda: _torch(logits, tokens, unknown, count, impl)  # noqa: E731
    benchmark.group = f"confidence_remask {problem['name']} float32"
    benchmark.extra_info["impl"] = impl
    if impl == "native" and "target" in problem:
        benchmark.extra_info["target"] = problem["target"]
    with torch.inference_mode():
        benchmark(run)
