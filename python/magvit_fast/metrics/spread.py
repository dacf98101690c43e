"""Mean and spread over the repeats of a measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation (over n, as the published +- are).

    MAGVIT runs all repeats of an evaluation through one loader and splits the samples into
    contiguous folds; these are the folds' values.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
