"""Frechet distance between two sets of features, accumulated batch by batch.

The formula and its numerics are those of TF-GAN's `frechet_classifier_distance_from_activations`,
which MAGVIT's evaluation calls: covariances over n - 1, float64 inside, and the trace of the root of
a product of covariances through the symmetric form root(A) B root(A) and singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-10  # singular values below this are noise; TF-GAN leaves them as they are


class FeatureMoments:
    """Count, mean and scatter matrix of features, in memory that does not grow: O(D**2).

    Batches of any size may come in any split; `merge` and `gathered` join what was accumulated
    apart (Chan et al. 1979: the scatter of a union from the scatters of its parts).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # float64 [D]
        self.scatter: Tensor | None = None  # float64 [D, D], sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """The moments of features [N, D]."""
        moments = cls()
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Take up a batch [N, D] of any real dtype and device.

        Raises:
            ValueError: another shape, another D than before, NaN or infinite values.
            TypeError: complex or boolean features.
        """
        check_features("features", features)
        if not len(features):
            return
        batch = FeatureMoments()
        values = features.detach().cpu().double()
        batch.count = len(values)
        batch.mean = values.mean(dim=0)
        centered = values - batch.mean
        batch.scatter = centered.T @ centered
        self.merge(batch)

    def merge(self, other: FeatureMoments) -> None:
        """Take up what another accumulator has seen. Raises ValueError for another D."""
        if other.mean is None or other.scatter is None:
            return
        if self.mean is None or self.scatter is None:
            self.count = other.count
            self.mean, self.scatter = other.mean.clone(), other.scatter.clone()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"features: expected D = {len(self.mean)} as before, got {len(other.mean)}"
            )
        total = self.count + other.count
        apart = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += torch.outer(apart, apart) * (self.count * other.count / total)
        self.mean += apart * (other.count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """float64 [D, D], over n - 1. Raises ValueError for fewer than two samples."""
        if self.scatter is None or self.count < 2:
            raise ValueError(
                f"features: expected at least 2 samples for a covariance, got {self.count}"
            )
        return self.scatter / (self.count - 1)


def check_features(name: str, features: Tensor) -> None:
    """Real, finite [N, D]. Raises TypeError or ValueError that names the argument."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(features).__name__}")
    if features.is_complex() or features.dtype == torch.bool:
        raise TypeError(f"{name}: expected a real dtype, got {features.dtype}")
    if features.dim() != 2 or features.shape[1] < 1:
        raise ValueError(f"{name}: expected [N, D], got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def frechet_distance(first: Tensor | FeatureMoments, second: Tensor | FeatureMoments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 root(C1 C2)): squared Frechet distance of two Gaussians.

    Args:
        first, second: features [N, D] or their moments; the two N may differ, D may exceed them.

    Returns:
        The distance; rounding may leave a value of -1e-12 where it is 0.

    Raises:
        ValueError: different D, fewer than two samples on a side, NaN.

    Source: Heusel et al. 2017, in the numerics of TF-GAN (see the module).
    """
    a, b = (
        side if isinstance(side, FeatureMoments) else FeatureMoments.of(side)
        for side in (first, second)
    )
    covariance_a, covariance_b = a.covariance(), b.covariance()
    assert a.mean is not None
    assert b.mean is not None
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"second: expected D = {len(a.mean)} as in first, got {len(b.mean)}; "
            "both sides need features of one network"
        )
    u, roots, vh = _symmetric_root(covariance_a)
    root_a = (u * roots) @ vh
    u, roots, vh = _symmetric_root(root_a @ (covariance_b @ root_a))
    trace_of_root = (u * roots * vh.T).sum()
    trace = torch.trace(covariance_a) + torch.trace(covariance_b) - 2.0 * trace_of_root
    return float(trace + (a.mean - b.mean).square().sum())


def _symmetric_root(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V^T of the square root of a symmetric, positive semidefinite matrix."""
    u, s, vh = torch.linalg.svd(matrix)
    return u, torch.where(s < _EPS, s, s.sqrt()), vh
