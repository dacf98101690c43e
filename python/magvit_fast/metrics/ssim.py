"""Structural similarity (Wang et al. 2004) on gray frames, as MAGVIT reports it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from magvit_fast.metrics.psnr import check_pair

_LUMA = (0.2125, 0.7154, 0.0721)
WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def to_gray(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B, 1, T, H, W] with the weights 0.2125, 0.7154, 0.0721; gray passes."""
    if video.shape[1] == 1:
        return video
    if video.shape[1] != 3:
        raise ValueError(f"video: expected 1 or 3 channels, got {video.shape[1]}")
    weights = video.new_tensor(_LUMA).view(1, 3, 1, 1, 1)
    return (video * weights).sum(dim=1, keepdim=True)


def _blur(images: Tensor, taps: Tensor) -> Tensor:
    """Separable Gaussian over the valid region. [N, 1, H, W] -> [N, 1, H - 10, W - 10]."""
    return F.conv2d(F.conv2d(images, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))


def frame_ssim(prediction: Tensor, target: Tensor, *, max_value: float = 1.0) -> Tensor:
    """SSIM of every frame: 11 x 11 Gaussian window (sigma 1.5), valid positions only, averaged.

    Args:
        prediction, target: float [B, C, T, H, W], C 1 or 3, H and W at least 11, in [0, max_value].
        max_value: the peak.

    Returns:
        float32 (float64 for float64 input) [B, T], at most 1.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match, NaN, frames too small.
    """
    check_pair(prediction, target)
    batch, _, frames, height, width = prediction.shape
    if min(height, width) < WINDOW:
        raise ValueError(f"prediction: expected frames of 11 x 11 or more, got {height} x {width}")
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    x, y = (
        to_gray(video.to(dtype)).transpose(1, 2).reshape(-1, 1, height, width)
        for video in (prediction, target)
    )
    luminance, structure = ssim_parts(x, y, gaussian_taps(x), max_value)
    return (luminance * structure).mean(dim=(1, 2, 3)).view(batch, frames)


def gaussian_taps(like: Tensor) -> Tensor:
    """The window along one axis: 11 weights that sum to 1, of `like`'s dtype and device."""
    offsets = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    return torch.softmax(-offsets.square() / (2 * _SIGMA**2), dim=0)


def ssim_parts(x: Tensor, y: Tensor, taps: Tensor, max_value: float) -> tuple[Tensor, Tensor]:
    """SSIM's two factors at every valid position: luminance, and contrast times structure.

    x, y: [N, 1, H, W]. Both results [N, 1, H - 10, W - 10].
    """
    mean_x, mean_y = _blur(x, taps), _blur(y, taps)
    variances = _blur(x * x + y * y, taps) - mean_x.square() - mean_y.square()
    covariance = _blur(x * y, taps) - mean_x * mean_y
    c1, c2 = (_K1 * max_value) ** 2, (_K2 * max_value) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def ssim(prediction: Tensor, target: Tensor, *, max_value: float = 1.0) -> Tensor:
    """`frame_ssim` averaged over the frames of each video: [B]."""
    return frame_ssim(prediction, target, max_value=max_value).mean(dim=1)
