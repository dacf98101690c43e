"""Features for a Frechet distance between sets of small clips, without a downloaded network.

NOT the published FVD (that needs I3D's weights, see `magvit-fast evaluate`): the network here is a
small one with random weights, the same for ever. Distances compare the variants of one run with
each other and mean nothing beside published numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast.metrics import frechet_distance

_SEED = 20_221_210
_WIDTHS = (3, 16, 32, 32)


class RandomVideoFeatures:
    """Videos [B, 3, T, H, W] in [0, 1] -> float32 [B, 32], for T, H, W of at least 8.

    Three layers of 3x3x3 convolutions (stride 2) with leaky rectifiers, their weights drawn once from
    a fixed seed and scaled to keep variances; half of the last channels see the clip, half the
    differences of successive frames (motion); then the mean over time and space. `calibrate` puts the
    features of real clips at mean 0 and deviation 1 each, so that none rules the distance.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self.weights = []
        for wide, narrow in zip(_WIDTHS[1:], _WIDTHS, strict=False):
            weight = torch.randn(wide, narrow, 3, 3, 3, generator=generator)
            self.weights.append(weight * (2.0 / (narrow * 27)) ** 0.5)
        self.mean = torch.zeros(_WIDTHS[-1])
        self.deviation = torch.ones(_WIDTHS[-1])

    def calibrate(self, real: Tensor) -> None:
        """Take mean and deviation of each feature from real clips."""
        found = self._raw(real)
        self.mean, self.deviation = found.mean(0), found.std(0).clamp(min=1e-6)

    def __call__(self, video: Tensor) -> Tensor:
        return (self._raw(video) - self.mean) / self.deviation

    @torch.no_grad()
    def _raw(self, video: Tensor) -> Tensor:
        half = _WIDTHS[-1] // 2
        still = self._network(video - 0.5)[:, :half]
        moving = self._network(4.0 * video.diff(dim=2))[:, half:]
        return torch.cat([still, moving], 1)

    def _network(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.leaky_relu(F.conv3d(x, weight, stride=2, padding=1), 0.2)
        return x.mean((2, 3, 4))


def distance(features: RandomVideoFeatures, generated: Tensor, real: Tensor) -> float:
    """Squared Frechet distance between two sets of clips."""
    return frechet_distance(features(generated), features(real))
