"""What stays masked: the noisy confidence of masked decoding, in both readings of it.

MAGVIT's released code adds the annealed Gumbel noise to the log-probability of a sampled token, and
mf.confidence_remask is that rule. MaskViT's description (and MAGVIT's prose) adds it to the
probability itself, and its code is not public. The two differ: at a temperature of 4.5 the noise
spreads over about 6, log p over several nats, p over 1 at most.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from magvit_fast import ops
from magvit_fast.nn.embedding import unpack_subtokens
from magvit_fast.ops._checks import check_choice
from magvit_fast.ops.confidence_remask import CHOICE_STREAM, gumbel

Confidence = Literal["log_probability", "probability"]
Noise = tuple[Tensor, Tensor]  # Gumbel [B, N, G, V] for the values, Gumbel [B, N] for the choice


def check_confidence(value: str) -> None:
    """Raises ValueError for anything but the two readings."""
    check_choice("confidence", value, get_args(Confidence))


def remask(
    logits: Tensor,
    tokens: Tensor,
    unknown: Tensor,
    *,
    num_unknown: int | Tensor,
    confidence: Confidence,
    temperature: float,
    choice_temperature: float,
    seed: int,
    step: int,
    noise: Noise | None,
) -> tuple[Tensor, Tensor]:
    """One step: a value for every unknown token, then the num_unknown least confident stay unknown.

    Arguments and result as mf.confidence_remask, which does all of it for "log_probability", and for
    both readings without noise: the logarithm keeps the order. With noise on the probability the op
    is called twice, once to draw the values and once to choose: one sub-token of one value has
    log p = 0, so there the confidence is the noise that is passed in. Both calls have a kernel; the
    step costs a log-sum-exp and a second selection more.
    """
    if confidence == "log_probability" or choice_temperature == 0:
        return ops.confidence_remask(
            logits, tokens, unknown, num_unknown=num_unknown, temperature=temperature,
            choice_temperature=choice_temperature, noise=noise,
            seed=seed, step=step,
        )  # fmt: skip
    tokens, _ = ops.confidence_remask(
        logits, tokens, unknown, num_unknown=0, temperature=temperature, noise=noise,
        seed=seed, step=step,
    )  # fmt: skip
    chosen = probability(logits, tokens)
    choice = choice_noise(chosen.shape, chosen.device, seed, step) if noise is None else noise[1]
    scores = chosen + choice_temperature * choice.to(chosen.dtype)
    flat = scores.new_zeros(*scores.shape, 1, 1)
    _, unknown = ops.confidence_remask(
        flat, tokens, unknown, num_unknown=num_unknown, temperature=0.0, choice_temperature=1.0,
        noise=(flat, scores),
    )  # fmt: skip
    return tokens, unknown


def probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Softmax probability (temperature 1) of packed tokens: [B, N], the product over sub-tokens.

    logits [B, N, G, V], V a power of two; tokens int64 [B, N]. In float32, float64 for such logits.
    """
    groups, values = logits.shape[2:]
    x = logits if logits.dtype == torch.float64 else logits.float()
    picks = unpack_subtokens(tokens, groups, values)
    logs = x.gather(-1, picks.unsqueeze(-1)).squeeze(-1) - x.logsumexp(-1)
    return logs.sum(-1).exp()


def choice_noise(shape: torch.Size, device: torch.device, seed: int, step: int) -> Tensor:
    """The Gumbel numbers [B, N] that the op draws for the choice."""
    index = torch.arange(shape.numel(), device=device).view(shape)
    return gumbel(index, step, CHOICE_STREAM, seed)
