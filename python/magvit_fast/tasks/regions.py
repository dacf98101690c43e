"""Where the given pixels of a task lie, and what stands in for the missing ones.

A region is a rule over a grid (T, H, W). MAGVIT applies the same rule to the pixel grid (which
pixels are given) and to the latent grid (which tokens are condition tokens); for moving windows the
two differ slightly, and the published token fractions are those of the latent rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]
Region = Callable[[Grid], Tensor]  # (T, H, W) -> bool [T, H, W], True inside
Fill = Callable[[Tensor], Tensor]  # video with the given region -> condition video, same shape


def _half(n: int) -> tuple[int, int]:
    """The central half of an axis: start and end."""
    return n // 4, n // 4 + n // 2


def central(grid: Grid) -> Tensor:
    """The central half of the rows and of the columns, at every time."""
    return horizontal_strip(grid) & vertical_strip(grid)


def vertical_strip(grid: Grid) -> Tensor:
    """The central half of the columns, all rows."""
    start, end = _half(grid[2])
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[:, :, start:end] = True
    return inside


def horizontal_strip(grid: Grid) -> Tensor:
    """The central half of the rows, all columns."""
    start, end = _half(grid[1])
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[:, start:end] = True
    return inside


def window_starts(steps: int, width: int) -> list[int]:
    """First columns of a window of half the width moving to the right (half to even)."""
    return torch.linspace(0, width / 2, steps, dtype=torch.float64).round().long().tolist()


def moving_strip(grid: Grid) -> Tensor:
    """A vertical strip of half the width moving from left to right, all rows."""
    inside = torch.zeros(grid, dtype=torch.bool)
    for t, start in enumerate(window_starts(grid[0], grid[2])):
        inside[t, :, start : start + grid[2] // 2] = True
    return inside


def moving_hole(grid: Grid) -> Tensor:
    """The central rows of the moving strip."""
    return moving_strip(grid) & horizontal_strip(grid)


def complement(region: Region) -> Region:
    """Everything outside the region."""
    return lambda grid: ~region(grid)


def replicate_around(region: Region) -> Fill:
    """Fill with the nearest pixel of a static box."""

    def fill(video: Tensor) -> Tensor:
        _, _, t, h, w = video.shape
        inside = region((t, h, w))[0]
        rows = inside.any(1).nonzero().flatten()
        cols = inside.any(0).nonzero().flatten()
        top, bottom = int(rows[0]), int(rows[-1])
        left, right = int(cols[0]), int(cols[-1])
        box = video[:, :, :, top : bottom + 1, left : right + 1]
        pads = (left, w - 1 - right, top, h - 1 - bottom, 0, 0)
        return F.pad(box, pads, mode="replicate")

    return fill


def black_outside(region: Region) -> Fill:
    """Fill with zeros (black in [0, 1])."""

    def fill(video: Tensor) -> Tensor:
        inside = region((video.shape[2], video.shape[3], video.shape[4])).to(video.device)
        return video * inside

    return fill


def frames_between(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """`frames` frames from leading [B, C, F, H, W] to trailing [B, C, L, H, W] given ones.

    Without trailing frames the last leading frame is repeated; with them the gap is a linear blend,
    of weight k / (gap + 1) for k = 1..gap.
    """
    gap = frames - first.shape[2] - last.shape[2]
    before = first[:, :, -1:]
    if last.shape[2] == 0:
        return torch.cat([first, before.expand(-1, -1, gap, -1, -1)], dim=2)
    weight = torch.arange(1, gap + 1, device=first.device, dtype=first.dtype) / (gap + 1)
    weight = weight.view(1, 1, gap, 1, 1)
    return torch.cat([first, torch.lerp(before, last[:, :, :1], weight), last], dim=2)
