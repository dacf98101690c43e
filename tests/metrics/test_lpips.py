"""LPIPS against its formula in NumPy, over VGG-16 from files and any other backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import Lpips, load_lpips
from magvit_fast.metrics.lpips import Vgg16

WIDTHS = (64, 128, 256, 512, 512)


def _linear(suffix: str = ".model.1.weight") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"lin{i}{suffix}": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate(WIDTHS)
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    weights = {name: value.half() for name, value in Vgg16().state_dict().items()}
    weights["classifier.0.weight"] = torch.zeros(2, 2)  # torchvision's file holds the whole network
    save_file(weights, folder / "vgg16.safetensors")
    torch.save(_linear(), folder / "linear.pth")
    return folder / "vgg16.safetensors", folder / "linear.pth"


def test_layout_of_vgg16() -> None:
    """Names and sizes are torchvision's, so that its file fits."""
    shapes = {name: tuple(value.shape) for name, value in Vgg16().state_dict().items()}
    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert list(shapes) == [f"features.{i}.{kind}" for i in layers for kind in ("weight", "bias")]
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert sum(np.prod(shape) for shape in shapes.values()) == 14_714_688
    maps = Vgg16()(torch.rand(1, 3, 32, 48))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3),
    ]  # fmt: skip
    assert all((m >= 0).all() for m in maps)  # after the activation


def test_the_formula(files: tuple[Path, Path]) -> None:
    measure = load_lpips(*files)
    x, y = torch.rand(2, 2, 3, 3, 32, 32)
    network = Vgg16()
    network.load_state_dict(
        {k: v.float() for k, v in load_file(files[0]).items() if k.startswith("features")}
    )
    linear = [value.numpy().reshape(1, -1, 1, 1) for value in _linear().values()]
    expected = np.zeros(2)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    for clip in range(2):
        a, b = (
            network((v[clip].transpose(0, 1) * 2 - 1 - shift) / scale) for v in (x, y)
        )  # frames as a batch
        for map_a, map_b, weights in zip(a, b, linear, strict=True):
            p, q = (m.detach().double().numpy() for m in (map_a, map_b))
            p, q = (m / (np.sqrt((m**2).sum(1, keepdims=True)) + 1e-10) for m in (p, q))
            expected[clip] += (weights * (p - q) ** 2).sum(1).mean((1, 2)).mean()
    np.testing.assert_allclose(measure(x, y).numpy(), expected, rtol=1e-4)


def test_properties(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = load_lpips(*files)
    x, y = torch.rand(2, 1, 3, 5, 16, 16)
    assert measure(x, x).tolist() == [0.0]
    torch.testing.assert_close(measure(x, y), measure(y, x))
    near, far = measure(x + 0.01 * (y - x), x), measure(x + 0.5 * (y - x), x)
    assert 0 < near < far
    whole = measure(x, y)
    monkeypatch.setattr("magvit_fast.metrics.lpips._BATCH_FRAMES", 2)
    torch.testing.assert_close(measure(x, y), whole)


def test_any_backbone() -> None:
    """One map of two channels: unit vectors by hand."""

    def backbone(images: Tensor) -> list[Tensor]:
        found = (3.0, 4.0) if images.mean() > 0 else (1.0, 0.0)
        return [torch.tensor(found).view(1, 2, 1, 1).expand(len(images), 2, 4, 4)]

    measure = Lpips(backbone, [torch.tensor([10.0, 1.0])])
    light, dark = torch.ones(1, 3, 1, 4, 4), torch.zeros(1, 3, 1, 4, 4)
    assert float(measure(light, dark)) == pytest.approx(10 * (0.6 - 1) ** 2 + 0.8**2, rel=1e-6)


def test_plain_names_and_headless_backbone(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain = {name.removesuffix(".model.1.weight"): v.flatten() for name, v in _linear().items()}
    save_file(plain, tmp_path / "linear.safetensors")
    torch.manual_seed(0)
    bare = {name.removeprefix("features."): v for name, v in Vgg16().state_dict().items()}
    torch.save(bare, tmp_path / "vgg.pth")
    x, y = torch.rand(2, 1, 3, 1, 16, 16)
    torch.testing.assert_close(
        load_lpips(tmp_path / "vgg.pth", tmp_path / "linear.safetensors")(x, y),
        load_lpips(*files)(x, y),
        rtol=1e-2, atol=1e-3,
    )  # fmt: skip


def test_bad_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    backbone, linear = files
    with pytest.raises(FileFormatError, match="none: no such file"):
        load_lpips(tmp_path / "none", linear)
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(FileFormatError, match=r"text\.pth: is no file of weights"):
        load_lpips(backbone, tmp_path / "text.pth")
    with pytest.raises(FileFormatError, match="holds no VGG-16"):
        load_lpips(linear, linear)
    with pytest.raises(FileFormatError, match="holds no LPIPS weights for VGG-16"):
        load_lpips(backbone, backbone)


def test_bad_input(files: tuple[Path, Path]) -> None:
    measure: Any = load_lpips(*files)
    good = torch.rand(1, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="3 channels, got 1"):
        measure(good[:, :1], good[:, :1])
    with pytest.raises(ValueError, match="target: expected the shape"):
        measure(good, good[..., :8])
    with pytest.raises(ValueError, match="one vector a feature map, got none"):
        Lpips(nn.Identity(), [])
    with pytest.raises(ValueError, match=r"weights >= 0"):
        Lpips(nn.Identity(), [torch.tensor([1.0, -1.0])])
    with pytest.raises(ValueError, match=r"maps of \[3\] channels, got \[2\]"):
        Lpips(lambda images: [images], [torch.ones(2)])(good, good)
