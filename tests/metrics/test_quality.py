"""PSNR and SSIM against closed forms, a direct sum and arrays of the MAGVIT release."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.goldens import load_goldens
from torch import Tensor

from magvit_fast.metrics import frame_psnr, frame_ssim, psnr, ssim
from magvit_fast.metrics.ssim import gaussian_taps, ssim_parts, to_gray


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    arrays = load_goldens("magvit_v1/09_metrics")
    return {key: torch.from_numpy(array) for key, array in arrays.items() if key != "note"}


def _videos(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Channels-last in the file -> [B, C, T, H, W]."""
    first, second = (golden[key].permute(0, 4, 1, 2, 3) for key in ("video1", "video2"))
    return first, second


def test_psnr_equals_the_release(golden: dict[str, Tensor]) -> None:
    got = frame_psnr(*_videos(golden))
    torch.testing.assert_close(got, golden["psnr_per_frame"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, golden["tf_psnr"], rtol=1e-5, atol=1e-5)
    video_psnr = psnr(*_videos(golden))
    torch.testing.assert_close(video_psnr, golden["psnr_per_video"], rtol=1e-5, atol=1e-5)


def test_ssim_equals_the_release(golden: dict[str, Tensor]) -> None:
    got = frame_ssim(*_videos(golden))
    torch.testing.assert_close(got, golden["ssim_per_frame"], rtol=0, atol=1e-5)
    torch.testing.assert_close(got, golden["tf_ssim"], rtol=0, atol=1e-5)
    torch.testing.assert_close(ssim(*_videos(golden)), golden["ssim_per_video"], rtol=0, atol=1e-5)


def test_ssim_map_equals_the_release(golden: dict[str, Tensor]) -> None:
    x, y = (to_gray(video)[:1, :, 0] for video in _videos(golden))  # frame 0 of the first clip
    luminance, structure = ssim_parts(x, y, gaussian_taps(x), 1.0)
    expected = golden["ssim_map_frame0"].permute(0, 3, 1, 2)
    torch.testing.assert_close(luminance * structure, expected, rtol=0, atol=1e-5)


def test_gray_equals_the_release(golden: dict[str, Tensor]) -> None:
    gray = to_gray(_videos(golden)[0])[:, 0].reshape(6, 32, 32, 1)
    torch.testing.assert_close(gray, golden["gray1"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.01])
def test_psnr_of_a_constant_offset(offset: float) -> None:
    target = torch.zeros(2, 3, 4, 8, 8, dtype=torch.float64)
    expected = torch.full((2, 4), -20 * np.log10(offset), dtype=torch.float64)
    torch.testing.assert_close(frame_psnr(target + offset, target), expected)


def test_psnr_averages_decibels_not_errors() -> None:
    target = torch.zeros(1, 1, 2, 4, 4)
    prediction = target.clone()
    prediction[:, :, 0], prediction[:, :, 1] = 0.1, 0.01
    assert psnr(prediction, target).item() == pytest.approx(30.0, abs=1e-4)


def test_max_value_scales() -> None:
    a, b = torch.rand(2, 1, 3, 2, 16, 16).unbind()
    torch.testing.assert_close(psnr(a * 255, b * 255, max_value=255), psnr(a, b))
    torch.testing.assert_close(ssim(a * 255, b * 255, max_value=255), ssim(a, b))


def test_equal_videos() -> None:
    video = torch.rand(1, 3, 2, 16, 16)
    assert torch.isinf(psnr(video, video)).all()
    torch.testing.assert_close(ssim(video, video), torch.ones(1))


def test_ssim_against_a_direct_sum() -> None:
    """The definition, window by window, in NumPy float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 13, 12, dtype=torch.float64, generator=generator).numpy()
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    values = []
    for top in range(3):
        for left in range(2):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (taps * a).sum(), (taps * b).sum()
            va, vb = (taps * (a - ma) ** 2).sum(), (taps * (b - mb) ** 2).sum()
            cov = (taps * (a - ma) * (b - mb)).sum()
            top_part = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(top_part / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    got = ssim(torch.from_numpy(x).view(1, 1, 1, 13, 12), torch.from_numpy(y).view(1, 1, 1, 13, 12))
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(np.mean(values), abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_low_precision_is_measured_in_float32(metric: object) -> None:
    video = torch.rand(1, 3, 2, 16, 16).bfloat16()
    noisy = (video + 0.1).bfloat16()
    assert callable(metric)
    torch.testing.assert_close(metric(noisy, video), metric(noisy.float(), video.float()))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_input(metric: object) -> None:
    assert callable(metric)
    good = torch.rand(1, 3, 2, 16, 16)
    with pytest.raises(ValueError, match=r"prediction: expected .* got"):
        metric(good[0], good[0])
    with pytest.raises(ValueError, match="target: expected the shape"):
        metric(good, good[:, :, :1])
    with pytest.raises(TypeError, match="floating"):
        metric(good, (good * 255).byte())
    with pytest.raises(ValueError, match="NaN"):
        metric(good, good * float("nan"))


def test_ssim_needs_a_whole_window() -> None:
    small = torch.rand(1, 3, 2, 10, 16)
    with pytest.raises(ValueError, match="11 x 11 or more, got 10 x 16"):
        ssim(small, small)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        ssim(torch.rand(1, 2, 1, 16, 16), torch.rand(1, 2, 1, 16, 16))
