"""Clips of a model's shape out of video files, and the scores of what a model makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from magvit_fast.data.video import iter_frames, read_video
from magvit_fast.errors import FileFormatError
from magvit_fast.tasks import ClipGeometry


def check_shape(frames: int | None, size: tuple[int, int] | None, geometry: ClipGeometry) -> None:
    """--frames and --size beside models that make clips of one shape: nothing, or that shape.

    Raises ValueError for any other.
    """
    height, width = geometry.height, geometry.width
    if frames not in (None, geometry.frames):
        raise ValueError(
            f"--frames: the models make clips of {geometry.frames} frames, got {frames}; leave it out"
        )
    if size not in (None, (height, width)):
        raise ValueError(
            f"--size: the models make clips of {height}x{width} pixels, got "
            f"{'x'.join(map(str, size or ()))}; leave it out"
        )


def read_clip(path: str | Path, shape: tuple[int, int, int], start: int = 0) -> Tensor:
    """[1, 3, T, H, W]: the frames from `start` on, center-cropped and resized.

    Raises FileFormatError where the file holds fewer than T frames.
    """
    frames, height, width = shape
    clip = read_video(path, frames=frames, size=(height, width), start=start)
    return clip.unsqueeze(0)


def iter_clips(path: str | Path, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Consecutive clips [1, 3, T, H, W] of a file, one in memory; a short rest is left out.

    Raises FileFormatError where the file holds not even one.
    """
    count, height, width = shape
    frames = iter_frames(path, size=(height, width))
    found = 0
    while len(piece := list(itertools.islice(frames, count))) == count:
        found += 1
        yield torch.stack(piece, dim=1).unsqueeze(0)
    if not found:
        raise FileFormatError(
            f"{path}: is too short: {count} frames needed, found {len(piece)}; give a longer clip"
        )


def copy_last(video: Tensor, given: int) -> Tensor:
    """The trivial predictor: the last given frame, repeated. [B, C, T, H, W] -> [.., T - given, ..]."""
    return video[:, :, given - 1 : given].expand(-1, -1, video.shape[2] - given, -1, -1)
