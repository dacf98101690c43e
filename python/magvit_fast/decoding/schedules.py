"""Schedules of masked decoding: how many tokens stay unknown, how strong guidance is.

Sources: MAGVIT, algorithm 1 and the released code (mask schedules, clipping); MaskViT (its own
counts and names); MDT (guidance that grows over the steps), which MAGVIT-v2 cites. Everything is
plain arithmetic in float64 on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# MaskViT's names. Concave ones decode best there (cosine, square, cubic), square_root worst.
SYNONYMS = {"linear": "uniform", "square": "pow2", "cubic": "pow3", "square_root": "pow0.5"}
NAMES = (
    "uniform (linear), cosine, log, exp, pow<exponent> (square, cubic, square_root), "
    "poly:<coefficients>"
)


def mask_fraction(schedule: str, progress: float, num_tokens: int) -> float:
    """Fraction of all tokens that stay unknown at a progress in [0, 1], within [1e-6, 1].

    With r the progress and N the number of tokens:
        uniform 1 - r | pow<a> 1 - r**a | cosine cos(pi r / 2) | log -log2(r) / log2(N)
        exp 1 - 2**(-log2(N) (1 - r)) | poly:<c0>,<c1>,... c0 r**n + c1 r**(n-1) + ... (highest
        first) | linear = uniform | square = pow2 | cubic = pow3 | square_root = pow0.5

    Raises:
        ValueError: an unknown schedule, or a progress outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress: expected a value in [0, 1], got {progress}")
    schedule = SYNONYMS.get(schedule, schedule)
    bits = math.log2(max(num_tokens, 2))
    if schedule == "uniform":
        fraction = 1.0 - progress
    elif schedule == "cosine":
        fraction = math.cos(math.pi / 2 * progress)
    elif schedule == "log":
        fraction = math.inf if progress == 0 else -math.log2(progress) / bits
    elif schedule == "exp":
        fraction = 1.0 - 2.0 ** (-bits * (1.0 - progress))
    elif schedule.startswith("pow"):
        (exponent,) = _numbers(schedule, schedule[len("pow") :], count=1)
        fraction = 1.0 - progress**exponent
    elif schedule.startswith("poly:"):
        fraction = 0.0
        for coefficient in _numbers(schedule, schedule[len("poly:") :]):
            fraction = fraction * progress + coefficient
    else:
        raise ValueError(f"schedule: expected one of {NAMES}, got {schedule!r}")
    return min(max(fraction, 1e-6), 1.0)


def unknown_counts(schedule: str, num_tokens: int, steps: int) -> list[int]:
    """How many of `num_tokens` are unknown after each of `steps` steps.

    After step k (from 0): floor(N * fraction((k + 1) / steps)), at least 1 and at most one fewer
    than before. A single unknown token therefore becomes known in the next step, and 0 stays 0.
    (The released code makes all tokens unknown again there.) The last count may be above 0: a
    decoder takes every token of its last step as final.

    Raises:
        ValueError: unknown schedule, num_tokens < 1 or steps < 1.
    """
    _check_sizes(num_tokens, steps)
    counts, before = [], num_tokens
    for k in range(steps):
        wanted = math.floor(num_tokens * mask_fraction(schedule, (k + 1) / steps, num_tokens))
        before = max(0, min(max(wanted, 1), before - 1))
        counts.append(before)
    return counts


def masked_counts(schedule: str, num_tokens: int, steps: int) -> list[int]:
    """MaskViT's rule: how many of `num_tokens` future tokens are masked after each of `steps` passes.

    After pass t (from 1): ceil(N * fraction(t / steps)), and 0 after the last. Nothing is clipped:
    where N is small or the schedule flat, a pass may keep no token; every pass but the last leaves at
    least one.

    Raises:
        ValueError: unknown schedule, num_tokens < 1 or steps < 1.
    """
    _check_sizes(num_tokens, steps)
    counts = []
    for t in range(1, steps):
        exact = num_tokens * mask_fraction(schedule, t / steps, num_tokens)
        # rounded first: 1024 * cos(pi / 3) is 512 and a rounding error, whose ceiling is 513
        counts.append(math.ceil(round(exact, 6)))
    return [*counts, 0]


def _check_sizes(num_tokens: int, steps: int) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected 1 or more, got {num_tokens}")
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = conditional + s * (conditional - unconditional).

    scale: s; 0 switches guidance off (and saves the second pass). In the other common notation, u +
        w * (c - u), w = 1 + s.
    schedule: "constant", or "cosine_power": s(r) = s * (1 - cos(pi * r**power)) / 2 at progress
        r = (k + 1) / steps, MDT's weight, which starts near 0 and reaches s in the last step.
    """

    scale: float = 0.0
    schedule: Literal["constant", "cosine_power"] = "constant"
    power: float = 4.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ValueError(f"guidance: expected a scale of 0 or more, got {self.scale}")
        if self.schedule not in ("constant", "cosine_power"):
            raise ValueError(
                f"guidance: expected the schedule constant or cosine_power, got {self.schedule!r}"
            )
        if self.power <= 0:
            raise ValueError(f"guidance: expected a positive power, got {self.power}")

    def at(self, progress: float) -> float:
        """The scale at a progress in [0, 1]."""
        if self.schedule == "constant":
            return self.scale
        return self.scale * 0.5 * (1.0 - math.cos(math.pi * progress**self.power))


def _numbers(schedule: str, text: str, count: int | None = None) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or (count is not None and len(values) != count):
        raise ValueError(f"schedule: expected one of {NAMES}, got {schedule!r}")
    return values
