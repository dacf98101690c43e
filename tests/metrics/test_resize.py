"""Resizing rules against arrays of TensorFlow and JAX, and by hand."""

from __future__ import annotations

import pytest
import torch
from tests.goldens import load_goldens
from torch import Tensor

from magvit_fast.metrics import central_crop, resize_bilinear

NAMES = {"tf1": "tf1", "aligned": "aligned", "half_pixel": "jaximage_bilinear"}


def _golden(name: str) -> Tensor:
    """Channels-last in the file -> [B, C, T, H, W]."""
    return torch.from_numpy(load_goldens("magvit_v1/09_metrics")[name]).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("size", [(24, 32), (28, 28), (7, 5), (12, 16)])
@pytest.mark.parametrize("corners", ["tf1", "aligned", "half_pixel"])
def test_equals_the_release(corners: str, size: tuple[int, int]) -> None:
    got = resize_bilinear(_golden("resize_in"), size, corners=corners)  # type: ignore[arg-type]
    expected = _golden(f"resize_{NAMES[corners]}_{size[0]}x{size[1]}")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_central_crop_equals_the_release() -> None:
    cropped = central_crop(_golden("resize_in"), (8, 10))
    assert torch.equal(cropped, _golden("central_crop_8x10"))


def test_the_rules_on_a_line() -> None:
    """[0, 1, 2, 3] to 8: where the samples lie."""
    line = torch.arange(4.0).view(1, 1, 1, 1, 4)

    def resized(corners: str) -> list[float]:
        found = resize_bilinear(line, (1, 8), corners=corners)  # type: ignore[arg-type]
        return found.flatten().tolist()

    assert resized("tf1") == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resized("aligned") == pytest.approx([i * 3 / 7 for i in range(8)])
    assert resized("half_pixel") == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_central_crop_of_odd_rests() -> None:
    frame = torch.arange(5.0).view(1, 1, 1, 1, 5)
    assert central_crop(frame, (1, 2)).flatten().tolist() == [1, 2]


def test_bad_input() -> None:
    video = torch.rand(1, 3, 2, 4, 4)
    with pytest.raises(ValueError, match="corners: expected one of"):
        resize_bilinear(video, (8, 8), corners="tf2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 x 1"):
        resize_bilinear(video, (0, 8), corners="tf1")
    with pytest.raises(ValueError, match="at most 4 x 4, got 5 x 4"):
        central_crop(video, (5, 4))
