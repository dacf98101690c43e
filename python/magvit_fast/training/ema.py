"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Keeps `model`, a copy whose weights follow average = decay * average + (1 - decay) * weights.

    Buffers are copied as they are. The copy is in eval mode and needs no gradient.
    """

    def __init__(self, source: M, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a value in [0, 1), got {decay}")
        self.decay = decay
        self.model: M = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: M) -> None:
        """Take in the weights after an optimizer step."""
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(source.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)
        for own, other in zip(self.model.buffers(), source.buffers(), strict=True):
            own.copy_(other)
