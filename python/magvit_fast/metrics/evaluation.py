"""All measures of a stream of generated videos against real ones, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magvit_fast.metrics.best_of import TrialScores
from magvit_fast.metrics.frechet import FeatureMoments, frechet_distance
from magvit_fast.metrics.gather import from_all_processes
from magvit_fast.metrics.inception import ClassStatistics
from magvit_fast.metrics.lpips import Lpips
from magvit_fast.metrics.ms_ssim import MIN_SIZE, ms_ssim
from magvit_fast.metrics.psnr import psnr
from magvit_fast.metrics.spread import spread
from magvit_fast.metrics.ssim import WINDOW, ssim

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Networks:
    """What the user has given; a measure without its network is left out of the results.

    fvd: e.g. features.VideoFeatures; fid: features.ImageFeatures; inception: features.C3DLogits;
    lpips: lpips.Lpips.
    """

    fvd: Features | None = None
    fid: Features | None = None
    inception: Features | None = None
    lpips: Lpips | None = None


class Evaluation:
    """Takes up generated videos and the real clips beside them, a batch at a time.

    Args:
        networks: of the measures that need one.
        folds: repeats; distances and the inception score are stated as mean and spread over them.
        best: see best_of.TrialScores.

    PSNR, SSIM, LPIPS and, for frames of 161 pixels and more, MS-SSIM compare each sample with the
    clip that it was conditioned on. Every process may take up its own samples: `results` gathers.
    """

    def __init__(
        self,
        networks: Networks = Networks(),
        *,
        folds: int = 1,
        best: frozenset[str] = frozenset(),
    ) -> None:
        if folds < 1:
            raise ValueError(f"folds: expected at least 1, got {folds}")
        self.networks = networks
        self.scores = [TrialScores(best) for _ in range(folds)]  # the best trial is one of its fold
        self._moments: dict[tuple[str, str, int], FeatureMoments] = {}
        self._classes: dict[int, ClassStatistics] = {}
        self._folds = folds
        self._samples = 0

    def add(
        self,
        generated: Tensor,
        real: Tensor,
        *,
        clips: list[int],
        folds: list[int] | None = None,
        first: list[bool] | None = None,
        paired: bool = True,
    ) -> None:
        """Take up samples [B, 3, T, H, W] in [0, 1] with their real clips of the same shape.

        Args:
            clips: number of each sample's real clip.
            folds: repeat of each sample (0 for all).
            first: whether the real clip is new to its fold; a distribution takes it up once.
            paired: whether a sample is to resemble its clip (not so for class generation).

        Raises:
            ValueError, TypeError: shapes that do not match, values outside [0, 1], a fold out of
                range.
        """
        count = len(generated)
        folds, first = folds or [0] * count, first if first is not None else [True] * count
        if generated.shape != real.shape or {len(clips), len(folds), len(first)} != {count}:
            raise ValueError(
                f"generated: expected as many samples as real clips, numbers, folds and flags, got "
                f"{tuple(generated.shape)}, {tuple(real.shape)}, {len(clips)}, {len(folds)}, "
                f"{len(first)}"
            )
        if count and not 0 <= min(folds) <= max(folds) < self._folds:
            raise ValueError(f"folds: expected 0 to {self._folds - 1}, got {folds}")
        if paired:
            self._compare(generated, real, clips, folds)
        for name, features in (("fvd", self.networks.fvd), ("fid", self.networks.fid)):
            if features is not None:
                self._take(name, "generated", features, generated, folds)
                new = [i for i, is_new in enumerate(first) if is_new]
                self._take(name, "real", features, real[new], [folds[i] for i in new])
        if self.networks.inception is not None:
            for logits, fold in zip(self.networks.inception(generated), folds, strict=True):
                self._classes.setdefault(fold, ClassStatistics()).update(logits.unsqueeze(0))
        self._samples += count

    def _take(
        self, name: str, side: str, features: Features, videos: Tensor, folds: list[int]
    ) -> None:
        if not len(videos):
            return
        rows = features(videos)
        per_video = len(rows) // len(videos)  # one of a video, or one of each frame
        owner = torch.tensor(folds).repeat_interleave(per_video)
        for fold in set(folds):
            moments = self._moments.setdefault((name, side, fold), FeatureMoments())
            moments.update(rows.cpu()[owner == fold])

    def _compare(self, generated: Tensor, real: Tensor, clips: list[int], folds: list[int]) -> None:
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr}
        least = min(generated.shape[3:])
        if least >= WINDOW:
            measures["ssim"] = ssim
        if least >= MIN_SIZE:
            measures["ms_ssim"] = ms_ssim
        if self.networks.lpips is not None:
            measures["lpips"] = self.networks.lpips
        found = {name: measure(generated, real).tolist() for name, measure in measures.items()}
        for i, (clip, fold) in enumerate(zip(clips, folds, strict=True)):
            self.scores[fold].add(clip, {name: values[i] for name, values in found.items()})

    def results(self) -> dict[str, Any]:
        """Every measure that something is known of (a collective call; the same on each process).

        "samples", "trials_per_clip" (fewest, most of a fold), and for each measure the mean over
        folds under its name, with "..._std" and "..._folds" when there are several.

        Raises ValueError when a fold has fewer than two samples on a side.
        """
        parts = from_all_processes((self._samples, self._moments, self._classes))
        moments: dict[tuple[str, str, int], FeatureMoments] = {}
        classes: dict[int, ClassStatistics] = {}
        for _, theirs, their_classes in parts:
            for key, part in theirs.items():
                moments.setdefault(key, FeatureMoments()).merge(part)
            for fold, statistics in their_classes.items():
                classes.setdefault(fold, ClassStatistics()).merge(statistics)
        found: dict[str, Any] = {"samples": sum(part[0] for part in parts)}
        scores = [fold for fold in (part.gathered() for part in self.scores) if fold.trials[1]]
        if scores:
            counts = [fold.trials for fold in scores]
            found["trials_per_clip"] = [min(few for few, _ in counts), max(c for _, c in counts)]
            means = [fold.mean() for fold in scores]
            for name in means[0]:
                found |= _stated(name, [mean[name] for mean in means])
        for name in ("fvd", "fid"):
            seen = sorted({fold for metric, _, fold in moments if metric == name})
            found |= _stated(name, [_distance(moments, name, fold) for fold in seen])
        return found | _stated(
            "inception_score", [classes[fold].score() for fold in sorted(classes)]
        )


def _distance(moments: dict[tuple[str, str, int], FeatureMoments], name: str, fold: int) -> float:
    real = moments.get((name, "real", fold), FeatureMoments())
    generated = moments.get((name, "generated", fold), FeatureMoments())
    if min(real.count, generated.count) < 2:
        raise ValueError(
            f"{name}: expected at least 2 samples a side in each repeat, got {real.count} real and "
            f"{generated.count} generated ones; give more clips or fewer repeats"
        )
    return frechet_distance(real, generated)


def _stated(name: str, values: list[float]) -> dict[str, Any]:
    if not values:
        return {}
    mean, deviation = spread(values)
    stated: dict[str, Any] = {name: mean}
    if len(values) > 1:
        stated |= {f"{name}_std": deviation, f"{name}_folds": values}
    return stated
