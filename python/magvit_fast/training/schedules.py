"""The learning rate as a pure function of the step: resuming needs no state for it."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, warmup: int, total: int) -> float:
    """Factor on the base learning rate at `step` = 0 .. total - 1.

    Rises linearly from 0 over the `warmup` first steps; then a cosine from 1 to 0 whose clock
    starts after the warm-up and runs total - warmup steps (MAGVIT's released code, but for its jump
    back to 1 at `total`).
    """
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
