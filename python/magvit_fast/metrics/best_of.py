"""Best-of-N protocols: several samples for each condition, scored against the one true future."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from magvit_fast.metrics.gather import from_all_processes

# Which end of a metric is the good one.
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "ms_ssim": True, "lpips": False}
# Metrics of which the best trial of a clip counts; of the others the mean over trials.
MAGVIT_BEST = frozenset({"psnr", "ssim"})
MASKVIT_BEST = frozenset({"psnr", "ssim", "lpips"})


@dataclass
class _Tally:
    """Best value, sum and number of trials of one metric on one clip."""

    best: float
    total: float = 0.0
    trials: int = 0


@dataclass
class TrialScores:
    """Scores of many trials a clip, in memory of a few numbers a clip.

    best: names of the metrics whose best trial counts: MAGVIT_BEST (BAIR: PSNR and SSIM of the best
        of 100 trials, LPIPS averaged; the released code's ssim_psnr_max_in_repeats), MASKVIT_BEST
        (all three), or none. The best trial of each metric is sought on its own.
    """

    best: frozenset[str] = frozenset()
    _tallies: dict[tuple[str, int], _Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.best) - set(HIGHER_IS_BETTER))
        if unknown:
            raise ValueError(f"best: expected names of {sorted(HIGHER_IS_BETTER)}, got {unknown}")

    def add(self, clip: int, scores: Mapping[str, float]) -> None:
        """One trial of clip number `clip`. Raises ValueError for a metric without a direction."""
        for name, value in scores.items():
            if name not in HIGHER_IS_BETTER:
                raise ValueError(
                    f"scores: expected names of {sorted(HIGHER_IS_BETTER)}, got {name!r}"
                )
            self._merge(name, clip, _Tally(value, value, 1))

    def _merge(self, name: str, clip: int, tally: _Tally) -> None:
        mine = self._tallies.get((name, clip))
        if mine is None:
            self._tallies[name, clip] = _Tally(tally.best, tally.total, tally.trials)
            return
        better = max if HIGHER_IS_BETTER[name] else min
        mine.best = better(mine.best, tally.best)
        mine.total += tally.total
        mine.trials += tally.trials

    def gathered(self) -> TrialScores:
        """The scores over all processes, the same on each (a collective call)."""
        whole = TrialScores(self.best)
        for part in from_all_processes(self):
            for (name, clip), tally in part._tallies.items():
                whole._merge(name, clip, tally)
        return whole

    @property
    def trials(self) -> tuple[int, int]:
        """Fewest and most trials of a clip; (0, 0) before the first."""
        counts = [tally.trials for tally in self._tallies.values()]
        return (min(counts), max(counts)) if counts else (0, 0)

    def mean(self) -> dict[str, float]:
        """Each metric over all clips: of a clip's best trial, or of the mean of its trials."""
        values: dict[str, list[tuple[int, float]]] = {}
        for (name, clip), tally in self._tallies.items():
            value = tally.best if name in self.best else tally.total / tally.trials
            values.setdefault(name, []).append((clip, value))
        # in the order of the clips: the sum does not depend on who saw which clip first
        return {
            name: math.fsum(value for _, value in sorted(found)) / len(found)
            for name, found in values.items()
        }
