"""The perceptual loss: distance between a classifier's logits for real and reconstructed frames.

MAGVIT's released code compares the logits of an ImageNet ResNet-50 (batch norm in inference mode)
on frames resized to 224; the same is assumed of MAGVIT-v2. The network here is ResNet-50 v1.5 in
plain torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from magvit_fast.errors import FileFormatError, MissingExtraError

_FILES = ("model.safetensors", "pytorch_model.bin")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, per color


class PerceptualLoss(nn.Module):
    """Mean squared difference of network(real) and network(fake), frame by frame.

    network: from images [N, 3, size, size] in [0, 1] to features of any shape. It is frozen, and
        stays in eval mode whatever train() is called on.
    """

    def __init__(self, network: nn.Module, size: int = 224) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.size = size

    def train(self, mode: bool = True) -> PerceptualLoss:
        return self  # batch norm keeps its running statistics

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """Videos [B, 3, T, H, W] -> scalar. No gradient flows into `real`."""
        with torch.no_grad():
            target = self._features(real)
        return F.mse_loss(self._features(fake).float(), target.float())

    def _features(self, video: Tensor) -> Tensor:
        frames = video.movedim(2, 1).flatten(0, 1)  # [B*T, 3, H, W]
        frames = F.interpolate(
            frames,
            size=(self.size, self.size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        features: Tensor = self.network(frames)
        return features


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided: "v1.5"), 1x1 convolutions with batch norm, around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet50(nn.Module):
    """Images [N, 3, H, W] in [0, 1] -> ImageNet logits [N, classes] (25,557,032 parameters).

    Parameter names are those of torchvision and timm.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for number, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            stage = []
            for i in range(blocks):
                stage.append(Bottleneck(channels, width, 2 if number > 1 and i == 0 else 1))
                channels = 4 * width
            setattr(self, f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, num_classes)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        logits: Tensor = self.fc(x.mean((-2, -1)))
        return logits


def load_resnet50(name: str) -> ResNet50:
    """ResNet-50 with ImageNet weights from a file, a folder or a Hugging Face hub id.

    Reads model.safetensors (from a folder also pytorch_model.bin, tensors only) with the parameter
    names of torchvision and timm ("layer1.0.conv1.weight", for example the hub's
    "timm/resnet50.tv_in1k") or of transformers ("resnet.encoder.stages.0.layers.0...", for example
    "microsoft/resnet-50").

    Raises FileFormatError when the weights are missing, damaged or not of a ResNet-50.
    """
    path = _find(name)
    try:
        state: dict[str, Any] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        state = {_torchvision_name(key): value for key, value in state.items()}
        network = ResNet50(len(state["fc.bias"]))
        network.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise FileFormatError(
            f"{path}: holds no weights of a ResNet-50 classifier ({reason}); give a folder or hub id "
            "such as timm/resnet50.tv_in1k or microsoft/resnet-50"
        ) from error
    return network.eval()


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        for file in _FILES:
            if (path / file).is_file():
                return path / file
        raise FileFormatError(f"{path}: holds neither {_FILES[0]} nor {_FILES[1]}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileFormatError(f"{name}: is no file, no folder and no hub id (owner/name)")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", f"loading {name} from the hub") from error
    try:
        return Path(hf_hub_download(name, _FILES[0]))
    except Exception as error:  # the hub's many kinds of "not there" and "not reachable"
        raise FileFormatError(
            f"{name}: {_FILES[0]} cannot be had from the hub ({str(error).splitlines()[0]}); "
            "check the name and the network, or give a local folder"
        ) from error


# transformers' names, each with its torchvision counterpart
_STEM = {"convolution": "conv1", "normalization": "bn1"}
_SHORTCUT = {"convolution": "downsample.0", "normalization": "downsample.1"}


def _torchvision_name(key: str) -> str:
    """A transformers parameter name in torchvision's terms; any other name as it is."""
    if match := re.fullmatch(r"resnet\.embedder\.embedder\.(\w+)\.(\w+)", key):
        return f"{_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)\.(\w+)", key):
        place = f"layer{int(match[1]) + 1}.{match[2]}"
        if part := re.fullmatch(r"shortcut\.(\w+)", match[3]):
            return f"{place}.{_SHORTCUT[part[1]]}.{match[4]}"
        if part := re.fullmatch(r"layer\.(\d)\.(convolution|normalization)", match[3]):
            kind = "conv" if part[2] == "convolution" else "bn"
            return f"{place}.{kind}{int(part[1]) + 1}.{match[4]}"
    return key.replace("classifier.1.", "fc.")
