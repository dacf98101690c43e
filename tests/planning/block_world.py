"""A block that is pushed over a plane: an environment, a model that knows it, and one in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from magvit_fast.planning import History

SIZE, WIDTH = 24, 0.12  # pixels of a side; standard deviation of the blob, the side being 1
LOW, HIGH, STEP = 0.15, 0.85, 0.12  # where the block can be, and how far an action moves it


def render(positions: torch.Tensor) -> torch.Tensor:
    """Positions [..., 2] (x, y) in [0, 1] -> frames [..., 3, SIZE, SIZE]."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    x, y = positions[..., 0, None], positions[..., 1, None]
    column = torch.exp(-((axis - x) ** 2) / (2 * WIDTH**2))
    row = torch.exp(-((axis - y) ** 2) / (2 * WIDTH**2))
    image = row[..., :, None] * column[..., None, :]
    return image.unsqueeze(-3).expand(*image.shape[:-2], 3, SIZE, SIZE)


def moved(position: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return (position + action.clamp(-STEP, STEP)).clamp(LOW, HIGH)


class BlockWorld:
    """gymnasium's calls; observations are uint8 [SIZE, SIZE, 3]."""

    def __init__(self, start: tuple[float, float], goal: tuple[float, float]) -> None:
        self.first, self.goal = torch.tensor(start), torch.tensor(goal)
        self.position = self.first

    def _observation(self) -> np.ndarray:
        return (render(self.position).permute(1, 2, 0) * 255).round().byte().numpy()

    def distance(self) -> float:
        return float((self.position - self.goal).norm())

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.position = self.first
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert isinstance(action, np.ndarray)
        self.position = moved(self.position, torch.from_numpy(action))
        return self._observation(), -self.distance(), self.distance() < 0.01, False, {}


class KnowsTheBlock:
    """A hand-written model: finds the block in the last frame, moves it, draws it."""

    context = 1

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, history: History, actions: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(actions))
        image = history.frames[0, -1]
        axis = (torch.arange(SIZE) + 0.5) / SIZE
        # the peak of a sampled Gaussian: a parabola through the logarithms around the maximum
        position = torch.stack([_peak(image.amax(0), axis), _peak(image.amax(1), axis)])
        position = position.expand(len(actions), 2)
        places = []
        for t in range(actions.shape[1]):
            position = moved(position, actions[:, t])
            places.append(position)
        return render(torch.stack(places, 1)).transpose(1, 2)  # [P, C, H, h, w]


def _peak(profile: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    i = int(profile[1:-1].argmax()) + 1
    a, b, c = (float(v) for v in profile[i - 1 : i + 2].clamp(min=1e-6).log())
    curve = a - 2 * b + c
    offset = 0.0 if curve == 0 else 0.5 * (a - c) / curve
    return axis[i] + max(-1.0, min(1.0, offset)) / SIZE


# --- the same in tokens: 8 x 8 cells, an action is a displacement in cells ------------------------

CELLS, PATCH = 8, 4


class Cells:
    """A tokenizer by hand: the mean of a patch above 1/2 is code 1."""

    config = SimpleNamespace(num_bits=1, time_stride=1, space_stride=PATCH)
    quantizer = SimpleNamespace(
        codes=lambda ids: torch.tensor([[0.0, 0.0], [1.0, 2.0]])[ids].movedim(-1, 1)
    )

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        cells = video.mean(1).unflatten(-1, (CELLS, PATCH)).unflatten(-3, (CELLS, PATCH))
        return (cells.mean((-1, -3)) > 0.5).long()

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        pixels = ids.float().repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
        return pixels.unsqueeze(1).expand(-1, 3, -1, -1, -1)


@dataclass(frozen=True)
class CellsConfig:
    frames: int = 6
    grid: tuple[int, int] = (CELLS, CELLS)
    codebook_size: int = 2
    action_dim: int = 2


class KnowsTheCells(nn.Module):
    """A transformer by hand: the last known frame, moved by the actions since."""

    config = CellsConfig()

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(
        self, ids: torch.Tensor, unknown: torch.Tensor, *, actions: torch.Tensor
    ) -> torch.Tensor:
        self.passes += 1
        axis = torch.arange(CELLS).float()
        last = int((~unknown[0].flatten(1).any(1)).nonzero()[-1])
        shown = ids[:, last].float()
        total = shown.sum((1, 2)).clamp(min=1)
        place = torch.stack([(shown.sum(1) @ axis) / total, (shown.sum(2) @ axis) / total], -1)
        rows = []
        for t in range(ids.shape[1]):
            if t > last:
                place = (place + actions[:, t - 1]).clamp(0, CELLS - 1)
            square = (axis - place[:, :1]).square()[:, None] + (axis - place[:, 1:]).square()[
                ..., None
            ]
            rows.append(4.0 - 2.0 * square)  # log-odds: a block of about 3 x 3 cells
        odds = torch.stack(rows, 1)
        return torch.stack([-odds / 2, odds / 2], -1)


def cell_frame(x: int, y: int) -> torch.Tensor:
    """Frame [3, 32, 32] of a block around a cell, as the model above would draw it."""
    axis = torch.arange(CELLS)
    ids = ((axis - x).square()[None] + (axis - y).square()[:, None] < 2).long()
    return Cells().decode(ids[None, None])[0, :, 0]
