"""A small MAGVIT-v2 pair and its clips."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from magvit_fast.models import (
    MaskedTransformer,
    MaskedTransformerConfig,
)

SIZE = 16  # 17 frames of 16 x 16 pixels -> 5 x 4 x 4 tokens of 6 bits


def make_transformer(**changes: Any) -> MaskedTransformer:
    torch.manual_seed(1)
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(5, 4, 4), subtoken_size=8,
        num_classes=3, init_std=0.5,
    )  # fmt: skip
    return MaskedTransformer(dataclasses.replace(config, **changes))


def clip(frames: int = 17, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
