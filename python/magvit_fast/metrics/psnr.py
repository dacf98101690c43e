"""Peak signal-to-noise ratio: of each frame, then averaged (the protocol of MAGVIT)."""

from __future__ import annotations

import torch
from torch import Tensor


def check_pair(prediction: Tensor, target: Tensor) -> None:
    """Both videos are floating [B, C, T, H, W] of one shape on one device, without NaN."""
    for name, video in (("prediction", prediction), ("target", target)):
        if video.ndim != 5:
            raise ValueError(f"{name}: expected [B, C, T, H, W], got {tuple(video.shape)}")
        if not video.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {video.dtype}")
        if torch.isnan(video).any():
            raise ValueError(f"{name}: expected numbers, got NaN")
    if prediction.shape != target.shape:
        raise ValueError(
            f"target: expected the shape of prediction, {tuple(prediction.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if prediction.device != target.device:
        raise ValueError(f"target: expected device {prediction.device}, got {target.device}")


def frame_psnr(prediction: Tensor, target: Tensor, *, max_value: float = 1.0) -> Tensor:
    """PSNR of every frame in dB: 10 log10(max_value**2 / MSE over C, H, W).

    Args:
        prediction, target: float [B, C, T, H, W], in [0, max_value].
        max_value: the peak.

    Returns:
        float32 (float64 for float64 input) [B, T]; infinite where the frames are equal.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match, NaN.
    """
    check_pair(prediction, target)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)).square().mean(dim=(1, 3, 4))
    return 10.0 * torch.log10(max_value**2 / error)


def psnr(prediction: Tensor, target: Tensor, *, max_value: float = 1.0) -> Tensor:
    """`frame_psnr` averaged over the frames of each video: [B]."""
    return frame_psnr(prediction, target, max_value=max_value).mean(dim=1)
