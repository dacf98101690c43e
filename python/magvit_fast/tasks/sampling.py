"""Which task a training step is for, when one model learns several (the released MAGVIT's rule)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COPIES = 100  # of the rarest task in one cycle


def task_sequence(weights: Sequence[float], seed: int = 0) -> list[int]:
    """One cycle of task numbers: step s is for task sequence[s % len(sequence)], the whole batch of it.

    Every number occurs 100 times, more in proportion to its weight over the smallest weight, in one
    fixed random order: (1, 2, 0.5) gives 200, 400 and 100 times. A pure function of its arguments, so
    that resumed runs and all processes agree.

    Raises:
        ValueError: no weight, or one that is not above 0.
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights: expected positive numbers, got {tuple(weights)}")
    copies = [round(COPIES * weight / min(weights)) for weight in weights]
    numbers = np.repeat(np.arange(len(copies)), copies)
    return [int(n) for n in np.random.default_rng([seed, len(copies)]).permutation(numbers)]
