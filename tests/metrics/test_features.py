"""How pixels reach the networks: every step by hand, and what happens with foreign ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import (
    C3DLogits,
    ImageFeatures,
    VideoFeatures,
    load_network,
    resize_bilinear,
)
from magvit_fast.metrics.features import call_options


class _Keeps:
    """Remembers what it was given and returns features made of it."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.seen, self.options = shape, [], {}

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        self.seen.append(x)
        self.options = options
        return x.mean((1, 2, 3, 4) if x.dim() == 5 else (1, 2, 3)).view(-1, *[1] * len(self.shape)).expand(
            -1, *self.shape
        )  # fmt: skip


def test_video_features() -> None:
    network = _Keeps(400)
    video = torch.rand(2, 3, 9, 16, 12)
    features = VideoFeatures(network)(video)
    (seen,) = network.seen
    assert seen.shape == (2, 3, 9, 224, 224)
    torch.testing.assert_close(seen, resize_bilinear(video, (224, 224), corners="tf1") * 2 - 1)
    assert features.shape == (2, 400)
    assert seen[..., 0, 0].equal(video[..., 0, 0] * 2 - 1)  # the corner stays the corner


def test_logits_are_averaged_over_time() -> None:
    over_time = torch.randn(2, 5, 7)
    features = VideoFeatures(lambda x: over_time, size=8)(torch.rand(2, 3, 9, 8, 8))
    torch.testing.assert_close(features, over_time.mean(2))
    deeper = over_time.view(2, 5, 7, 1, 1)
    features = VideoFeatures(lambda x: deeper, size=8)(torch.rand(2, 3, 9, 8, 8))
    torch.testing.assert_close(features, over_time.mean(2))


def test_large_batches_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magvit_fast.metrics.features._BATCH_FRAMES", 20)
    network, video = _Keeps(4), torch.rand(5, 3, 9, 8, 8)
    features = VideoFeatures(network, size=8)(video)
    assert [len(x) for x in network.seen] == [2, 2, 1]
    torch.testing.assert_close(features[:, 0], (video * 2 - 1).mean((1, 2, 3, 4)))
    network = _Keeps(4)
    frames = ImageFeatures(network, size=8)(video)
    assert [len(x) for x in network.seen] == [10, 10, 10, 10, 5]
    expected = (video * 2 - 1).mean((1, 3, 4)).flatten()  # clip after clip, frame after frame
    torch.testing.assert_close(frames[:, 0], expected)


def test_image_features() -> None:
    network = _Keeps(6, 2, 2)
    assert ImageFeatures(network, options={"return_features": True})(
        torch.rand(1, 3, 2, 8, 8)
    ).shape == (2, 6)
    assert network.seen[0].shape == (2, 3, 299, 299)
    assert network.options == {"return_features": True}


def test_c3d_logits() -> None:
    """BGR, aligned corners, 0 to 255, the offset added."""
    network = _Keeps(101)
    video = torch.rand(1, 3, 16, 20, 24)
    offset = torch.randn(3, 16, 112, 112)
    C3DLogits(network, offset)(video)
    (seen,) = network.seen
    assert seen.shape == (1, 3, 16, 112, 112)
    blue, red_offset = video[0, 2], offset[2]
    torch.testing.assert_close(seen[0, 0, :, 0, 0], blue[:, 0, 0] * 255 + offset[0, :, 0, 0])
    torch.testing.assert_close(seen[0, 0, :, -1, -1], blue[:, -1, -1] * 255 + offset[0, :, -1, -1])
    torch.testing.assert_close(
        seen[0, 2, :, -1, 0], video[0, 0, :, -1, 0] * 255 + red_offset[:, -1, 0]
    )
    C3DLogits(network)(video)
    torch.testing.assert_close(network.seen[1], seen - offset, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="expected 16 frames, as many as the offset"):
        C3DLogits(network, offset)(video[:, :, :9])
    with pytest.raises(ValueError, match=r"offset: expected \[3, T, 112, 112\]"):
        C3DLogits(network, offset[:, :, :100])


@pytest.mark.parametrize("features", [VideoFeatures, ImageFeatures, C3DLogits])
def test_bad_videos_and_foreign_networks(features: Any) -> None:
    good = torch.rand(2, 3, 9, 8, 8)
    with pytest.raises(TypeError, match="floating-point"):
        features(_Keeps(4))((good * 255).byte())
    with pytest.raises(ValueError, match=r"expected \[B, 3, T, H, W\]"):
        features(_Keeps(4))(good[:, :2])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        features(_Keeps(4))(good * 2 - 1)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        features(_Keeps(4))(good * float("nan"))
    for foreign in (lambda x: x.sum(), lambda x: {"logits": x}, lambda x: x[:1].flatten(1)):
        with pytest.raises(ValueError, match=r"network: expected features .* right network\?"):
            features(foreign)(good)
    with pytest.raises(ValueError, match="network: expected finite"):
        features(lambda x: x.flatten(1)[:, :3] * float("nan"))(good)


def test_too_few_frames() -> None:
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        VideoFeatures(_Keeps(4))(torch.rand(1, 3, 8, 8, 8))


class _Mean(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        found = x.mean((2, 3, 4))
        return found if return_features else found.softmax(1)


def test_torchscript_files(tmp_path: Path) -> None:
    torch.jit.script(_Mean()).save(str(tmp_path / "net.pt"))
    network = load_network(tmp_path / "net.pt")
    assert call_options(network) == {"return_features": True}
    video = torch.rand(2, 3, 9, 8, 8)
    got = VideoFeatures(network, 8, call_options(network))(video)
    torch.testing.assert_close(got, (video * 2 - 1).mean((2, 3, 4)))
    plain = torch.jit.trace(nn.Flatten(), torch.rand(1, 3, 9, 8, 8))
    assert call_options(plain) == {}
    assert call_options(lambda x: x) == {}


def test_files_that_are_no_network(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"none\.pt: no such file"):
        load_network(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no network")
    for name in ("weights.pt", "text.pt"):
        with pytest.raises(FileFormatError, match=rf"{name}: is no TorchScript network"):
            load_network(tmp_path / name)
