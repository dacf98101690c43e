"""Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from magvit_fast.metrics.psnr import check_pair
from magvit_fast.metrics.ssim import WINDOW, gaussian_taps, ssim_parts

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # table of the 2003 paper, finest scale first
MIN_SIZE = (WINDOW - 1) * 2 ** (len(_WEIGHTS) - 1) + 1  # 161: a whole window at the coarsest scale


def ms_ssim(prediction: Tensor, target: Tensor, *, max_value: float = 1.0) -> Tensor:
    """MS-SSIM of each video: of every frame and color channel, then averaged.

    Five scales, each half the one before (mean of 2 x 2 pixels; an odd last row or column is
    repeated), windows as in `ssim`. The contrast-structure terms of the four finer scales and the
    whole SSIM of the coarsest are averaged over positions, cut at 0 and multiplied with the
    published exponents, channel by channel as TensorFlow does. MAGVIT-v2 (table 3) reports
    MS-SSIM without saying on which channels.

    Args:
        prediction, target: float [B, C, T, H, W], H and W at least 161, in [0, max_value].
        max_value: the peak.

    Returns:
        float32 (float64 for float64 input) [B], in [0, 1].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match, NaN, frames too small.
    """
    check_pair(prediction, target)
    batch, _, _, height, width = prediction.shape
    if min(height, width) < MIN_SIZE:
        raise ValueError(
            f"prediction: expected frames of {MIN_SIZE} x {MIN_SIZE} or more (five scales), "
            f"got {height} x {width}"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    x, y = (v.to(dtype).reshape(-1, 1, height, width) for v in (prediction, target))
    taps = gaussian_taps(x)
    product = x.new_ones(x.shape[0])
    for scale, weight in enumerate(_WEIGHTS):
        luminance, structure = ssim_parts(x, y, taps, max_value)
        coarsest = scale == len(_WEIGHTS) - 1
        term = (luminance * structure if coarsest else structure).mean(dim=(1, 2, 3))
        product = product * term.clamp_min(0.0) ** weight
        if not coarsest:
            x, y = (_half(image) for image in (x, y))
    return product.view(batch, -1).mean(dim=1)


def _half(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    return F.avg_pool2d(F.pad(images, (0, width % 2, 0, height % 2), mode="replicate"), 2)
