"""Masked decoding: all tokens at once, the least confident again, in a few steps.

Source: MAGVIT algorithm 1 in the form of the released code. Condition tokens (COMMIT) are a special
kind of mask: while a position inside the condition region is unknown, the network sees its
condition token z~ in place of MASK; every position, inside too, ends with a token that the model
chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from magvit_fast.decoding.confidence import (
    Confidence,
    Noise,
    check_confidence,
    choice_noise,
    remask,
)
from magvit_fast.decoding.schedules import Guidance, unknown_counts
from magvit_fast.ops._checks import check_int, check_number
from magvit_fast.ops.confidence_remask import draw_values

# (tokens int64 [B, N], mask bool [B, N]) -> logits [B, N, G, V]
Predict = Callable[[Tensor, Tensor], Tensor]
_NEVER = -1e30  # added to a logit: never the largest, and finite


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises ValueError or TypeError for settings that no value can be drawn with."""
    check_int("seed", seed, least=0)
    check_int("top_k", top_k, least=0)
    check_number("temperature", temperature, least=0.0)
    if check_number("top_p", top_p, least=0.0) > 1:
        raise ValueError(f"top_p: expected a value in [0, 1], got {top_p}")
    if top_k and top_p:
        raise ValueError(f"top_k and top_p: expected one of them, got {top_k}, {top_p}")


@dataclass(frozen=True)
class MaskedDecoding:
    """How to decode.

    Published values of (steps, schedule, choice_temperature): (12, cosine, 4.5) by default; BAIR
    (12, exp, 400); Kinetics-600 (12, uniform, 7.5); MAGVIT-v2 video (12 or 24, cosine, 32).

    steps, schedule: see schedules.unknown_counts; a tuple of ints in place of a name gives the
        number of unknown tokens after each step by hand.
    temperature: of the sampled values (0 = the most likely one).
    choice_temperature: T of the Gumbel noise on the confidence, annealed as
        T * (1 - (k + 1) / steps).
    confidence: what the noise is added to: "log_probability" (the released code) or "probability"
        (the prose; over a range of 1 the same noise hides nearly all of it). Without noise they
        order alike.
    seed: keys the counter-based random numbers; the same seed gives the same tokens on one device.
    top_k: values are drawn from the k most likely ones alone (0: from all); top_p: from the
        smallest set of the most likely ones that holds this probability (0: from all); not both.
        Confidences are those of the full distribution, as in the released code.
    fixed_condition: the tokens inside the condition region are known from the start and stay (the
        ablations "latent" and "fixed" of tasks.commit_mask); counts are over the other positions.
    """

    steps: int = 12
    schedule: str | tuple[int, ...] = "cosine"
    temperature: float = 1.0
    choice_temperature: float = 4.5
    guidance: Guidance = field(default_factory=Guidance)
    seed: int = 0
    top_k: int = 0
    top_p: float = 0.0
    fixed_condition: bool = False
    confidence: Confidence = "log_probability"

    def __post_init__(self) -> None:
        check_int("steps", self.steps, least=1)
        self.counts(1)  # raises for a bad schedule
        check_confidence(self.confidence)
        check_number("choice_temperature", self.choice_temperature, least=0.0)
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)

    def counts(self, num_tokens: int) -> list[int]:
        """Unknown tokens after each step. The last step leaves none, whatever the schedule says."""
        if isinstance(self.schedule, str):
            counts = unknown_counts(self.schedule, num_tokens, self.steps)
        else:
            given = list(self.schedule)
            if len(given) != self.steps or min(given) < 0 or given != sorted(given)[::-1]:
                raise ValueError(
                    f"schedule: expected {self.steps} falling numbers of tokens, got {given}"
                )
            counts = [min(n, num_tokens) for n in given]
        return [*counts[:-1], 0]


@dataclass(frozen=True)
class DecodingState:
    """After step `step` (from 0): tokens int64 [B, N] and which are unknown, bool [B, N].

    `tokens` holds a sample at every position; those of unknown positions are dropped in the next
    step.
    """

    step: int
    tokens: Tensor
    unknown: Tensor


def masked_decoding_steps(
    predict: Predict,
    condition: Tensor,
    condition_mask: Tensor,
    settings: MaskedDecoding,
    *,
    predict_unconditional: Predict | None = None,
    noise: Sequence[Noise] | None = None,
    first_step: int = 0,
) -> Iterator[DecodingState]:
    """Run masked decoding step by step; see decode_masked for the arguments."""
    _check(condition, condition_mask, settings, predict_unconditional, noise)
    inside = condition_mask.expand_as(condition)
    tokens, unknown = condition, torch.ones_like(inside)
    if settings.fixed_condition:
        unknown = ~inside
    for k, count in enumerate(_unknown_after(settings, unknown)):
        progress = (k + 1) / settings.steps
        shown = torch.where(unknown & inside, condition, tokens)
        logits = predict(shown, unknown & ~inside)
        scale = settings.guidance.at(progress)
        if predict_unconditional is not None and scale > 0:
            logits = guided(logits, predict_unconditional(tokens, unknown), scale)
        tokens, unknown = remask(
            logits,
            tokens,
            unknown,
            num_unknown=count,
            confidence=settings.confidence,
            temperature=settings.temperature,
            choice_temperature=settings.choice_temperature * (1.0 - progress),
            seed=settings.seed,
            step=first_step + k,
            noise=_step_noise(
                logits, settings, first_step + k, None if noise is None else noise[k]
            ),
        )
        yield DecodingState(k, tokens, unknown)
        if isinstance(count, int) and count == 0:
            return


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """conditional + scale * (conditional - unconditional), in float32 at least.

    In bfloat16 the difference, many times over, would be rounded to the spacing of the logits: values
    that are not equally likely would tie.
    """
    if conditional.dtype != torch.float64:
        conditional = conditional.float()
    return conditional + scale * (conditional - unconditional)


def _unknown_after(settings: MaskedDecoding, unknown: Tensor) -> list[int | Tensor]:
    """The number of unknown tokens after each step: ints, or one a sample where samples differ."""
    if not settings.fixed_condition:
        return [*settings.counts(unknown.shape[1])]
    starts = unknown.sum(1).tolist()
    if len(set(starts)) <= 1:
        return [*settings.counts(starts[0])] if starts and starts[0] else [0]
    counts = [settings.counts(n) if n else [0] * settings.steps for n in starts]
    return list(torch.tensor(counts, device=unknown.device).T)


def _step_noise(
    logits: Tensor, settings: MaskedDecoding, step: int, noise: Noise | None
) -> Noise | None:
    """The noise of one step; with top_k or top_p it rules the unlikely values out.

    So the choice is cut and the confidences are not.
    """
    if not (settings.top_k or settings.top_p) or settings.temperature == 0:
        return noise  # the most likely value is in every cut
    if noise is not None:
        return cut_noise(noise[0], logits.float(), settings.top_k, settings.top_p), noise[1]
    # What the op would draw without the others, as noise that lets nothing else win.
    likely = likely_values(logits.float(), settings.top_k, settings.top_p)
    scores = logits.float().masked_fill(~likely, -torch.inf) / settings.temperature
    picks = draw_values(scores, step, settings.seed).unsqueeze(-1)
    values = torch.full_like(scores, _NEVER).scatter_(-1, picks, 0.0)
    return values, choice_noise(logits.shape[:2], logits.device, settings.seed, step)


def cut_noise(noise: Tensor, logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The Gumbel noise of values, [..., V], that never lets one outside the cut win (0, 0: no cut)."""
    if not (top_k or top_p):
        return noise
    return noise.masked_fill(~likely_values(logits, top_k, top_p), _NEVER)


def likely_values(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """bool, logits' shape [..., V]: True for the values that top_k or top_p leaves.

    top_k keeps the k largest logits (more if some tie), top_p the fewest largest whose
    probabilities at temperature 1 add up to at least that much.
    """
    ranked = logits.sort(dim=-1, descending=True).values
    if top_k:
        last = ranked[..., min(top_k, logits.shape[-1]) - 1].unsqueeze(-1)
    else:
        mass = ranked.softmax(-1).cumsum(-1)
        index = (mass < top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        last = ranked.gather(-1, index)
    return logits >= last


@torch.no_grad()
def decode_masked(
    predict: Predict,
    condition: Tensor,
    condition_mask: Tensor,
    settings: MaskedDecoding,
    *,
    predict_unconditional: Predict | None = None,
    noise: Sequence[Noise] | None = None,
    first_step: int = 0,
) -> Tensor:
    """Decode all tokens: int64 [B, N].

    Args:
        predict: (tokens [B, N], mask [B, N]) -> logits [B, N, G, V]; mask True = MASK, the token is
            ignored.
        condition: condition tokens z~, int64 [B, N]; anything outside the region (zeros will do).
        condition_mask: bool [N] or [B, N], True inside the condition region; all False without
            condition.
        settings: steps, schedules, temperatures, seed.
        predict_unconditional: the same without condition; needed for guidance. It sees MASK in
            place of z~.
        noise: one pair of Gumbel arrays a step, in place of the seeded draws.
        first_step: added to the step number that keys the random numbers, for decoding in several
            windows.

    Raises:
        ValueError, TypeError: shapes, dtypes or settings that do not fit; the message names the
        argument.
    """
    tokens = condition
    for state in masked_decoding_steps(
        predict,
        condition,
        condition_mask,
        settings,
        predict_unconditional=predict_unconditional,
        noise=noise,
        first_step=first_step,
    ):
        tokens = state.tokens
    return tokens


def _check(
    condition: Tensor,
    condition_mask: Tensor,
    settings: MaskedDecoding,
    predict_unconditional: Predict | None,
    noise: Sequence[Noise] | None,
) -> None:
    if condition.dim() != 2 or condition.shape[1] < 1:
        raise ValueError(f"condition: expected [B, N], got {tuple(condition.shape)}")
    if condition.dtype != torch.int64:
        raise TypeError(f"condition: expected int64, got {condition.dtype}")
    if condition_mask.dtype != torch.bool:
        raise TypeError(f"condition_mask: expected bool, got {condition_mask.dtype}")
    if condition_mask.shape not in (condition.shape, condition.shape[1:]):
        raise ValueError(
            f"condition_mask: expected {tuple(condition.shape[1:])} or {tuple(condition.shape)}, "
            f"got {tuple(condition_mask.shape)}"
        )
    if settings.guidance.scale > 0 and predict_unconditional is None:
        raise ValueError("predict_unconditional: expected a function when guidance is on, got None")
    if noise is not None and len(noise) < settings.steps:
        raise ValueError(f"noise: expected {settings.steps} pairs, one a step, got {len(noise)}")
