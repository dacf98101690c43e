"""The networks that a user gives to `magvit-fast evaluate`, and how their measures are shown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import (
    C3DLogits,
    ImageFeatures,
    Networks,
    VideoFeatures,
    load_lpips,
    load_network,
)
from magvit_fast.metrics.features import MIN_FVD_FRAMES, call_options

_SHOWN = {
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "ms_ssim": ("MS-SSIM", ""),
    "lpips": ("LPIPS", ""),
    "fvd": ("FVD", ""),
    "fid": ("FID of frames", ""),
    "inception_score": ("inception score", ""),
}


def add_network_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "networks for the measures that need one",
        "TorchScript files (programs: from sources you trust) and weights; none come along",
    )
    group.add_argument(
        "--fvd-features", metavar="FILE.pt",
        help="I3D or another network: clips [b, 3, T, 224, 224] in [-1, 1] -> features",
    )  # fmt: skip
    group.add_argument(
        "--fid-features", metavar="FILE.pt",
        help="Inception or another: images [n, 3, 299, 299] in [-1, 1] -> features",
    )  # fmt: skip
    group.add_argument(
        "--is-features", metavar="FILE.pt",
        help="C3D or another: clips [b, 3, T, 112, 112], BGR in [0, 255] -> logits",
    )  # fmt: skip
    group.add_argument(
        "--is-offset", metavar="FILE", help="clip to be added before it (safetensors: offset)"
    )
    group.add_argument(
        "--lpips", nargs=2, metavar=("VGG16", "LINEAR"),
        help="weights of VGG-16 (torchvision's names) and of LPIPS (lin0 to lin4)",
    )  # fmt: skip


def load_networks(args: argparse.Namespace, device: torch.device, frames: int) -> Networks:
    """What the command line names. Raises FileFormatError (missing, foreign), ValueError (clips of
    too few frames for the Frechet video distance)."""
    if args.fvd_features is not None and frames < MIN_FVD_FRAMES:
        raise ValueError(
            f"--fvd-features: the Frechet video distance needs clips of at least {MIN_FVD_FRAMES} "
            f"frames, these have {frames}"
        )
    if args.is_offset is not None and args.is_features is None:
        raise ValueError("--is-offset: expected --is-features FILE.pt beside it")
    networks: dict[str, Any] = {}
    for option, name, kind in (
        ("fvd_features", "fvd", VideoFeatures),
        ("fid_features", "fid", ImageFeatures),
        ("is_features", "inception", C3DLogits),
    ):
        path = getattr(args, option)
        if path is None:
            continue
        network = load_network(path, device)
        options: dict[str, Any] = {"options": call_options(network)}
        if kind is C3DLogits and args.is_offset is not None:
            options["offset"] = _offset(args.is_offset, device)
        networks[name] = _Named(kind(network, **options), f"--{option.replace('_', '-')} {path}")
    if args.lpips is not None:
        networks["lpips"] = load_lpips(args.lpips[0], args.lpips[1], device)
    return Networks(**networks)


class _Named:
    """Features whose errors name the file: what a foreign network says is no help to anyone."""

    def __init__(self, features: Any, source: str) -> None:
        self.features, self.source = features, source

    def __call__(self, video: Tensor) -> Tensor:
        try:
            found: Tensor = self.features(video)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error)
            raise FileFormatError(
                f"{self.source}: cannot be used as such a network: {reason}"
            ) from error
        return found


def _offset(path: str, device: torch.device) -> Tensor:
    try:
        return load_file(path)["offset"].to(device)
    except (SafetensorError, OSError, KeyError) as error:
        raise FileFormatError(
            f"{path}: is no safetensors file with an array 'offset' [3, T, 112, 112]"
        ) from error


def named_networks(args: argparse.Namespace) -> dict[str, str]:
    """Measure -> the files of its network: a distance says nothing without them."""
    files = {
        "fvd": args.fvd_features,
        "fid": args.fid_features,
        "inception_score": args.is_features,
        "lpips": " ".join(args.lpips) if args.lpips else None,
    }
    return {name: file for name, file in files.items() if file is not None}


def measure_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """Results of metrics.Evaluation for people: name -> value, with the spread where there is one."""
    rows = {}
    for name, (label, unit) in _SHOWN.items():
        if name not in found:
            continue
        value = f"{found[name]:.4g}" + (f" {unit}" if unit else "")
        if f"{name}_std" in found:
            count = len(found[f"{name}_folds"])
            value += f" ± {found[f'{name}_std']:.2g} over {count} repeats"
        if name in found.get("networks", {}):
            value += f"  ({found['networks'][name]})"
        rows[label] = value
    return rows
