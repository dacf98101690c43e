"""Third-party models in small sizes, with random weights, for the tests of the drop-in backend."""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def diffusers() -> Any:
    """The package; the test is skipped without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, while it is imported
        return pytest.importorskip("diffusers")


class VGG16_Weights(enum.Enum):
    """Stands in for torchvision's, whose default the tokenizer's signature names and pickles."""

    DEFAULT = 1


def _stub(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def magvit2() -> Any:
    """magvit2_pytorch.magvit2_pytorch, the module of the layers and the tokenizer.

    It imports torchvision for a perceptual network that no test uses, and its package a trainer with
    more dependencies. Where those do not install, empty modules stand in for them while it is imported.
    """
    name = "magvit2_pytorch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(f"{name}.{name}")
        except ImportError:
            pass
        spec = importlib.util.find_spec(name)
        if spec is None:
            pytest.skip("magvit2-pytorch is not installed")
        models = _stub("torchvision.models", VGG16_Weights=VGG16_Weights)
        vision = {"torchvision": _stub("torchvision", models=models), "torchvision.models": models}
        package = _stub(name)
        package.__path__ = list(spec.submodule_search_locations or [])
        for loaded in [n for n in sys.modules if n.startswith(name)]:
            del sys.modules[loaded]
        sys.modules.update({name: package, **vision})
        try:
            module = pytest.importorskip(f"{name}.{name}")
        finally:
            for stub in vision:
                del sys.modules[stub]
        package.VideoTokenizer = module.VideoTokenizer  # type: ignore[attr-defined]
        return module


# --- diffusers' video autoencoders ------------------------------------------------------------
# name -> (constructor arguments, clip [C, T, H, W]); norm groups of 8 in place of 32 where widths are small
_WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {
    "AutoencoderKLWan": (_WAN, (3, 9, 16, 16)),
    "AutoencoderKLQwenImage": (_WAN, (3, 5, 16, 16)),
    "AutoencoderKLCogVideoX": (
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "temporal_compression_ratio": 4,
        },
        (3, 9, 16, 16),
    ),
    "AutoencoderKLCosmos": (
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "patch_size": 4,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        (3, 9, 32, 32),
    ),
    "AutoencoderKLHunyuanVideo": (
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        (3, 9, 16, 16),
    ),
    "AutoencoderKLMagvit": (
        {
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        (3, 9, 16, 16),
    ),
    "AutoencoderVidTok": (  # its tiled decode takes the published number of levels for granted
        {
            "ch": 32,
            "ch_mult": [1, 1, 1, 1],
            "z_channels": 4,
            "num_res_blocks": 1,
            "regularizer": "kl",
        },
        (3, 5, 16, 16),
    ),
    "AutoencoderKLLTXVideo": (
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "patch_size": 1,
        },
        (3, 9, 16, 16),
    ),
    "AutoencoderKLMochi": (
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "latent_channels": 4,
        },
        (3, 7, 16, 16),
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32,), "latent_channels": 4, "sample_size": 16},
        (3, 3, 16, 16),
    ),
    "AutoencoderKLHunyuanVideo15": (
        {
            "latent_channels": 4,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "temporal_compression_ratio": 2,
        },
        (3, 5, 16, 16),
    ),
    "AutoencoderKLKVAEVideo": (
        {"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "z_channels": 4},
        (3, 9, 16, 16),
    ),
}


def autoencoder(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A small model of that class in evaluation mode, and a clip for it in [-1, 1]."""
    arguments, size = CONFIGS[name]
    torch.manual_seed(seed)
    model = getattr(diffusers(), name)(**arguments).eval()
    return model, torch.rand(1, *size) * 2 - 1


def encode_decode(model: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """(latent without noise, reconstruction), whatever the class packs them in."""
    frames = model.config.get("sample_size") and "TemporalDecoder" in type(model).__name__
    if frames:  # folds frames into the batch
        latent = model.encode(video[0].transpose(0, 1)).latent_dist.mode()
        return latent, model.decode(latent, num_frames=video.shape[2]).sample
    encoded = model.encode(video)
    latent = encoded.latent_dist if hasattr(encoded, "latent_dist") else encoded[0]
    latent = latent if isinstance(latent, Tensor) else latent.mode()
    decoded = model.decode(latent)
    return latent, decoded if isinstance(decoded, Tensor) else decoded.sample
