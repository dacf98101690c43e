"""MS-SSIM against its definition in NumPy, torchmetrics, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional as F

from magvit_fast.metrics import ms_ssim


def _pair(height: int, width: int, noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 2, height // 8, width // 8, generator=generator, dtype=dtype)
    target = F.interpolate(coarse, size=(2, height, width), mode="trilinear")
    extra = torch.randn(target.shape, generator=generator, dtype=dtype) * noise
    return (target + extra).clamp(0, 1), target


def _direct(x: np.ndarray, y: np.ndarray) -> float:
    """The definition on one plane [H, W], window by window."""
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    product = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        a, b = (sliding_window_view(plane, (11, 11)) for plane in (x, y))
        mean_a, mean_b = ((taps * v).sum((2, 3)) for v in (a, b))
        var_a = (taps * (a - mean_a[..., None, None]) ** 2).sum((2, 3))
        var_b = (taps * (b - mean_b[..., None, None]) ** 2).sum((2, 3))
        cov = (taps * (a - mean_a[..., None, None]) * (b - mean_b[..., None, None])).sum((2, 3))
        term = (2 * cov + 9e-4) / (var_a + var_b + 9e-4)
        if scale == 4:
            term = term * (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        product *= max(term.mean(), 0.0) ** weight
        x, y = (np.pad(p, [(0, n % 2) for n in p.shape], mode="edge") for p in (x, y))
        x, y = (p.reshape(p.shape[0] // 2, 2, -1, 2).mean((1, 3)) for p in (x, y))
    return product


@pytest.mark.parametrize("size", [(176, 168), (161, 163)])
def test_against_the_definition(size: tuple[int, int]) -> None:
    prediction, target = _pair(*size, 0.1, torch.float64)
    expected = [
        np.mean([_direct(p.numpy(), t.numpy()) for p, t in zip(a, b, strict=True)])
        for a, b in zip(
            prediction[:, :, :1].flatten(1, 2), target[:, :, :1].flatten(1, 2), strict=True
        )
    ]
    got = ms_ssim(prediction[:, :, :1], target[:, :, :1])
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_is_near_torchmetrics(noise: float) -> None:
    """Which reflects the borders of the coarsest scale instead of leaving them out."""
    metrics = pytest.importorskip("torchmetrics.functional.image")
    prediction, target = (v[:1, :1, :1] for v in _pair(256, 256, noise, torch.float32))
    expected = metrics.multiscale_structural_similarity_index_measure(
        prediction[:, :, 0], target[:, :, 0], data_range=1.0, normalize="relu"
    )
    assert float(ms_ssim(prediction, target)) == pytest.approx(float(expected), abs=5e-3)


def test_equal_videos_and_range() -> None:
    prediction, target = _pair(176, 161, 0.3, torch.float32)
    torch.testing.assert_close(ms_ssim(target, target), torch.ones(2))
    value = ms_ssim(prediction, target)
    assert (value > 0).all()
    assert (value < 0.9).all()
    torch.testing.assert_close(
        ms_ssim(prediction * 255, target * 255, max_value=255), value, rtol=1e-4, atol=1e-5
    )
    assert (ms_ssim(1 - target, target) < 0.05).all()  # anticorrelated: cut at 0


def test_too_small() -> None:
    small = torch.rand(1, 3, 1, 160, 200)
    with pytest.raises(ValueError, match=r"161 x 161 or more .* got 160 x 200"):
        ms_ssim(small, small)
