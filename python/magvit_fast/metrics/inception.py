"""Inception score: how sure a classifier is of each sample, and how varied it finds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magvit_fast.metrics.frechet import check_features


class ClassStatistics:
    """What the inception score needs of a stream of logits, in memory that does not grow: O(K)."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None  # float64 [K], sum of p(y | x)
        self.negative_entropy = 0.0  # sum over x of sum_y p log p, nats

    def update(self, logits: Tensor) -> None:
        """Take up logits [N, K]. Raises ValueError or TypeError for anything else, or NaN."""
        check_features("logits", logits)
        log_p = logits.detach().cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        part = ClassStatistics()
        part.count, part.total = len(p), p.sum(dim=0)
        part.negative_entropy = float((p * log_p).sum())
        self.merge(part)

    def merge(self, other: ClassStatistics) -> None:
        """Take up what another accumulator has seen. Raises ValueError for another K."""
        if other.total is None:
            return
        if self.total is None:
            self.total = torch.zeros_like(other.total)
        if self.total.shape != other.total.shape:
            raise ValueError(
                f"logits: expected K = {len(self.total)} as before, got {len(other.total)}"
            )
        self.count += other.count
        self.total += other.total
        self.negative_entropy += other.negative_entropy

    def score(self) -> float:
        """exp of the mean over x of KL(p(y | x) || p(y)): 1 to K.

        Raises ValueError when nothing was taken up.
        """
        if self.total is None or not self.count:
            raise ValueError("logits: expected at least 1 sample, got none")
        p = self.total / self.count
        # mean KL = mean of sum p log p - sum of p(y) log p(y): the second factor does not depend on x
        return math.exp(self.negative_entropy / self.count - float(torch.xlogy(p, p).sum()))


def inception_score(logits: Tensor) -> float:
    """Inception score of logits [N, K] (Salimans et al. 2016), float64 inside.

    MAGVIT's protocol for UCF-101: logits of a C3D network (see features.C3DLogits), the score of
    each fold of the samples, then their mean and spread (`spread`).

    Raises:
        ValueError, TypeError: not [N, K], no sample, NaN.
    """
    statistics = ClassStatistics()
    statistics.update(logits)
    return statistics.score()
