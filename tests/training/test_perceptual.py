"""The perceptual loss and the loading of its network's weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from magvit_fast.errors import FileFormatError
from magvit_fast.training.perceptual import Bottleneck, PerceptualLoss, ResNet50, load_resnet50


@pytest.fixture(scope="module")
def network():
    """Random weights, running statistics included."""
    torch.manual_seed(0)
    network = ResNet50(num_classes=7)
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return network.eval()


def transformers_state(network):
    """The same weights under the names of transformers' ResNetForImageClassification."""
    state = {}
    for key, value in network.state_dict().items():
        first, *rest = key.split(".")
        kinds = {"conv": "convolution", "bn": "normalization"}
        if first in ("conv1", "bn1"):
            name = f"resnet.embedder.embedder.{kinds[first[:-1]]}.{rest[0]}"
        elif first == "fc":
            name = f"classifier.1.{rest[0]}"
        else:
            block = f"resnet.encoder.stages.{int(first[5:]) - 1}.layers.{rest[0]}"
            if rest[1] == "downsample":
                name = (
                    f"{block}.shortcut.{('convolution', 'normalization')[int(rest[2])]}.{rest[3]}"
                )
            else:
                kind, number = rest[1][:-1], int(rest[1][-1]) - 1
                name = f"{block}.layer.{number}.{kinds[kind]}.{rest[2]}"
        state[name] = value
    return state


def test_parameter_count():
    assert sum(p.numel() for p in ResNet50().parameters()) == 25_557_032


def test_bottleneck_by_hand():
    torch.manual_seed(0)
    block = Bottleneck(8, 4, stride=2).eval()
    x = torch.randn(1, 8, 6, 6)
    y = torch.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    y = torch.relu(block.bn2(F.conv2d(y, block.conv2.weight, stride=2, padding=1)))  # v1.5
    y = block.bn3(F.conv2d(y, block.conv3.weight))
    shortcut = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), torch.relu(y + shortcut))


@pytest.mark.parametrize("names", ["torchvision", "transformers"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_load_under_both_namings(network, tmp_path, names, file):
    state = network.state_dict() if names == "torchvision" else transformers_state(network)
    if file.endswith("bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / file)
    images = torch.rand(2, 3, 64, 64)
    loaded = load_resnet50(str(tmp_path))
    assert not loaded.training
    assert torch.equal(loaded(images), network(images))


def test_mistakes_are_named(network, tmp_path):
    with pytest.raises(FileFormatError, match="holds neither"):
        load_resnet50(str(tmp_path))
    with pytest.raises(FileFormatError, match="no hub id"):
        load_resnet50(str(tmp_path / "absent" / "folder"))
    bad = tmp_path / "model.safetensors"
    bad.write_bytes(b"no weights")
    with pytest.raises(
        FileFormatError, match=r"model\.safetensors: holds no weights of a ResNet-50"
    ):
        load_resnet50(str(tmp_path))
    save_file({"fc.bias": torch.zeros(3)}, bad)
    with pytest.raises(FileFormatError, match="holds no weights of a ResNet-50"):
        load_resnet50(str(tmp_path))


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(FileFormatError, match=r"some/name: .*no route.*local folder"):
        load_resnet50("some/name")


def test_loss_is_the_squared_difference_of_logits_frame_by_frame(network):
    torch.manual_seed(1)
    loss = PerceptualLoss(network, size=32)
    real, fake = torch.rand(2, 3, 2, 16, 16), torch.rand(2, 3, 2, 16, 16, requires_grad=True)

    def logits(video):
        frames = [F.interpolate(clip[:, t][None], (32, 32), mode="bilinear") for clip in video
                  for t in range(2)]  # fmt: skip
        return torch.cat([network(frame) for frame in frames])

    expected = (logits(real) - logits(fake)).square().mean()
    value = loss(fake, real)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert fake.grad.abs().max() > 0
    assert loss(fake.detach(), fake.detach()) == 0


def test_network_stays_frozen_and_in_inference_mode():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    loss = PerceptualLoss(network, size=8).train()
    loss(torch.rand(1, 3, 1, 8, 8), torch.rand(1, 3, 1, 8, 8))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert torch.equal(network[1].running_mean, torch.zeros(4))
