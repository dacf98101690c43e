"""LPIPS (Zhang et al. 2018): distance of deep features, with weights that the user gives.

torchmetrics and the lpips package have it too, both bound to torchvision and a download; here the
published formula runs over any backbone, and over VGG-16 from a plain file of weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from magvit_fast.errors import FileFormatError
from magvit_fast.metrics.psnr import check_pair

# Of RGB in [-1, 1]; ImageNet's, as LPIPS rounds them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of a stage
_BATCH_FRAMES = 64


class Vgg16(nn.Module):
    """The convolutions of VGG-16, images [N, 3, H, W] -> the 5 maps before each pooling.

    Parameter names are torchvision's ("features.0.weight" ...).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        channels = 3
        for stage, (width, count) in enumerate(_VGG16):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(self.features):
            images = layer(images)
            if number in self.taps:
                maps.append(images)
        return maps


class Lpips:
    """Perceptual distance of two videos, frame by frame: smaller is closer.

    For each map of the backbone: unit length along the channels, squared difference, weighted sum
    over channels, mean over positions; then the sum over maps.

    Args:
        backbone: images [N, 3, H, W] (RGB in [-1, 1], shifted and scaled as LPIPS does) -> maps
            [N, C_i, h_i, w_i].
        linear: one vector of C_i weights >= 0 a map.
    """

    def __init__(
        self, backbone: Callable[[Tensor], Sequence[Tensor]], linear: Sequence[Tensor]
    ) -> None:
        for number, weights in enumerate(linear):
            if weights.dim() != 1 or not bool((weights >= 0).all()):
                raise ValueError(
                    f"linear: expected vectors of weights >= 0, got {tuple(weights.shape)} "
                    f"with least {weights.min() if weights.numel() else 'none'} at {number}"
                )
        if not linear:
            raise ValueError("linear: expected one vector a feature map, got none")
        self.backbone, self.linear = backbone, list(linear)

    @torch.no_grad()
    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Videos [B, 3, T, H, W] in [0, 1] -> float32 [B], averaged over frames.

        Raises:
            ValueError, TypeError: videos that do not match, maps that do not fit the weights.
        """
        check_pair(prediction, target)
        if prediction.shape[1] != 3:
            raise ValueError(f"prediction: expected 3 channels, got {prediction.shape[1]}")
        x, y = (v.float().movedim(2, 1).flatten(0, 1) for v in (prediction, target))
        parts = [
            self._distance(a, b)
            for a, b in zip(x.split(_BATCH_FRAMES), y.split(_BATCH_FRAMES), strict=True)
        ]
        return torch.cat(parts).view(prediction.shape[0], -1).mean(dim=1)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> [N]."""
        pairs = list(zip(self._maps(x), self._maps(y), strict=True))
        if [a.shape[1] for a, _ in pairs] != [len(weights) for weights in self.linear]:
            raise ValueError(
                f"linear: expected weights for maps of {[a.shape[1] for a, _ in pairs]} channels, "
                f"got {[len(weights) for weights in self.linear]}"
            )
        total = x.new_zeros(len(x))
        for (a, b), weights in zip(pairs, self.linear, strict=True):
            difference = (_unit(a) - _unit(b)).square()
            weighted = difference * weights.to(difference).view(1, -1, 1, 1)
            total += weighted.sum(dim=1).mean(dim=(1, 2))
        return total

    def _maps(self, images: Tensor) -> Sequence[Tensor]:
        shift, scale = (images.new_tensor(v).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        return self.backbone((images * 2.0 - 1.0 - shift) / scale)


def _unit(features: Tensor) -> Tensor:
    length = features.square().sum(dim=1, keepdim=True).sqrt()
    return features / (length + _EPS)


def load_lpips(
    backbone: str | os.PathLike[str],
    linear: str | os.PathLike[str],
    device: torch.device | str = "cpu",
) -> Lpips:
    """LPIPS-VGG from two files of weights (safetensors, or .pth with tensors alone).

    Args:
        backbone: VGG-16 with torchvision's names (its ImageNet file, or its "features" alone).
        linear: LPIPS's own weights, "lin0.model.1.weight" [1, C, 1, 1] to lin4 (the lpips package's
            weights/v0.1/vgg.pth), or "lin0" [C] to "lin4".

    Raises FileFormatError when a file is missing, damaged or of another network.
    """
    network = Vgg16()
    weights = {
        name if name.startswith("features.") else f"features.{name}": value
        for name, value in _read_weights(backbone).items()
        if not name.startswith("classifier.")
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise FileFormatError(
            f"{backbone}: holds no VGG-16 ({str(error).splitlines()[-1].strip()}); "
            "give torchvision's weights of it"
        ) from error
    found = {}
    for name, value in _read_weights(linear).items():
        if match := re.fullmatch(r"lin(\d)(?:\.model\.1\.weight)?", name):
            found[int(match.group(1))] = value.float().flatten().to(device)
    widths = [width for width, _ in _VGG16]
    if [len(found.get(i, ())) for i in range(len(widths))] != widths:
        raise FileFormatError(
            f"{linear}: holds no LPIPS weights for VGG-16 (lin0 to lin4 of {widths} channels); "
            "give weights/v0.1/vgg.pth of the lpips package"
        )
    network = network.to(device).eval().requires_grad_(False)
    return Lpips(network, [found[i] for i in range(len(widths))])


def _read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; LPIPS needs weights from you")
    try:
        state: dict[str, Any] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # unpickling raises what it likes
        raise FileFormatError(
            f"{path}: is no file of weights (safetensors, or tensors alone in .pth); "
            "download it again"
        ) from error
