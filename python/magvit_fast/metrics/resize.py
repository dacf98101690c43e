"""The ways of resizing that metrics are defined with; they differ by where pixels are taken to lie."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Corners = Literal["tf1", "aligned", "half_pixel"]


def resize_bilinear(video: Tensor, size: tuple[int, int], *, corners: Corners) -> Tensor:
    """Bilinear resize of every frame.

    Args:
        video: float [..., H, W].
        size: (height, width) of the result.
        corners: "tf1": output pixel i samples at i * H / height (TensorFlow 1's default; Frechet
            video distance). "aligned": at i * (H - 1) / (height - 1) (the C3D inception score).
            "half_pixel": pixel centers, with an antialiasing filter where it shrinks (JAX).

    Returns:
        [..., height, width].

    Raises:
        ValueError: an unknown rule, sizes below 1.
    """
    if corners not in get_args(Corners):
        raise ValueError(f"corners: expected one of {get_args(Corners)}, got {corners!r}")
    if min(size) < 1 or video.dim() < 2 or 0 in video.shape[-2:]:
        raise ValueError(
            f"size: expected frames and target of at least 1 x 1, got {tuple(video.shape)} -> {size}"
        )
    if tuple(video.shape[-2:]) == tuple(size):
        return video
    if corners == "tf1":
        return _tf1(_tf1(video, size[1]).mT, size[0]).mT
    planes = video.reshape(-1, 1, *video.shape[-2:])
    resized = F.interpolate(
        planes,
        size=size,
        mode="bilinear",
        align_corners=corners == "aligned",
        antialias=corners == "half_pixel",
    )
    return resized.view(*video.shape[:-2], *size)


def _tf1(x: Tensor, size: int) -> Tensor:
    """The last axis sampled at i * n / size; what lies past the last value repeats it."""
    n = x.shape[-1]
    place = torch.arange(size, device=x.device, dtype=torch.float64) * (n / size)
    low = place.long().clamp_max(n - 1)
    weight = (place - low).to(x.dtype)
    high = (low + 1).clamp_max(n - 1)
    return torch.lerp(x.index_select(-1, low), x.index_select(-1, high), weight)


def central_crop(video: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle `size` = (height, width) pixels of [..., H, W]; odd rests lie below and right.

    Raises ValueError when the frames are smaller.
    """
    height, width = video.shape[-2:]
    if not (1 <= size[0] <= height and 1 <= size[1] <= width):
        raise ValueError(f"size: expected at most {height} x {width}, got {size[0]} x {size[1]}")
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return video[..., top : top + size[0], left : left + size[1]]
