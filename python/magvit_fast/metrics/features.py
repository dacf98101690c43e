"""From videos to the features that Frechet distances and inception scores compare.

No network comes along: the published ones (I3D on Kinetics-400, C3D on UCF-101, Inception) are
given by the user, as a TorchScript file or as any callable. What is fixed here is how pixels reach
them, which moves the scores as much as the weights do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast.errors import FileFormatError
from magvit_fast.metrics.frechet import check_features
from magvit_fast.metrics.resize import resize_bilinear

Network = Callable[..., Any]
MIN_FVD_FRAMES = 9  # I3D's pooling in time leaves nothing of fewer
_BATCH_FRAMES = 512  # frames of 224 x 224 in one call: 300 MB


class VideoFeatures:
    """Features for the Frechet video distance: [B, 3, T, H, W] in [0, 1] -> float32 [B, D].

    Frames are resized straight to `size` in TensorFlow 1's manner and scaled to [-1, 1]; the network
    gets [b, 3, T, size, size] and returns [b, D] (I3D: 400 logits) or [b, D, T'], averaged over time.

    Args:
        network: callable on such tensors, on the device the videos will be on.
        size: 224 for I3D.
        options: keyword arguments of every call.

    Source: MAGVIT's evaluation code and appendix B.3; Unterthiner et al. 2018.
    """

    def __init__(
        self, network: Network, size: int = 224, options: Mapping[str, Any] | None = None
    ) -> None:
        self.network, self.size, self.options = network, size, dict(options or {})

    def __call__(self, video: Tensor) -> Tensor:
        """Raises ValueError for other videos, fewer than 9 frames or foreign features."""
        check_video(video)
        if video.shape[2] < MIN_FVD_FRAMES:
            raise ValueError(
                f"video: the Frechet video distance needs at least {MIN_FVD_FRAMES} frames, "
                f"got {video.shape[2]}"
            )
        parts = [
            self._features(part) for part in video.split(max(1, _BATCH_FRAMES // video.shape[2]))
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def _features(self, video: Tensor) -> Tensor:
        frames = resize_bilinear(video.float(), (self.size, self.size), corners="tf1")
        return _rows(self.network(frames.mul(2.0).sub(1.0), **self.options), len(video))


class ImageFeatures:
    """Features for the Frechet image distance: [B, 3, T, H, W] in [0, 1] -> float32 [B * T, D].

    Every frame counts as an image, resized as in VideoFeatures to `size` (299 for Inception) and
    scaled to [-1, 1]; the network gets [n, 3, size, size] and returns [n, D] or [n, D, h, w],
    averaged over space.
    """

    def __init__(
        self, network: Network, size: int = 299, options: Mapping[str, Any] | None = None
    ) -> None:
        self.network, self.size, self.options = network, size, dict(options or {})

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Raises ValueError for other videos or foreign features."""
        check_video(video)
        images = video.movedim(2, 1).flatten(0, 1)
        parts = []
        for part in images.split(_BATCH_FRAMES // 2):
            resized = resize_bilinear(part.float(), (self.size, self.size), corners="tf1")
            parts.append(_rows(self.network(resized.mul(2.0).sub(1.0), **self.options), len(part)))
        return torch.cat(parts)


class C3DLogits:
    """Logits for the inception score of UCF-101: [B, 3, T, H, W] in [0, 1] -> float32 [B, K].

    Channels are reversed to BGR, frames resized to 112 x 112 with aligned corners and scaled to
    [0, 255], and the stored clip `offset` [3, T, 112, 112] is ADDED (the released array is a negated
    mean). The network gets [b, 3, T, 112, 112]; 16 frames for the published C3D with 101 classes.

    Source: MAGVIT's evaluation code; the network is that of TGAN-v2.
    """

    size = 112

    def __init__(
        self,
        network: Network,
        offset: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if offset is not None and (
            offset.dim() != 4 or (offset.shape[0], *offset.shape[2:]) != (3, 112, 112)
        ):
            raise ValueError(f"offset: expected [3, T, 112, 112], got {tuple(offset.shape)}")
        self.network, self.offset, self.options = network, offset, dict(options or {})

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Raises ValueError for other videos, another T than the offset's or foreign logits."""
        check_video(video)
        if self.offset is not None and self.offset.shape[1] != video.shape[2]:
            raise ValueError(
                f"video: expected {self.offset.shape[1]} frames, as many as the offset clip has, "
                f"got {video.shape[2]}"
            )
        parts = []
        for part in video.split(max(1, _BATCH_FRAMES // video.shape[2])):
            frames = resize_bilinear(
                part.float().flip(1), (self.size, self.size), corners="aligned"
            ).mul(255.0)
            if self.offset is not None:
                frames = frames + self.offset.to(frames)
            parts.append(_rows(self.network(frames, **self.options), len(part)))
        return torch.cat(parts)


def check_video(video: Tensor) -> None:
    """Floating [B, 3, T, H, W] in [0, 1]. Raises TypeError or ValueError."""
    if not isinstance(video, Tensor) or not video.is_floating_point():
        raise TypeError(
            f"video: expected a floating-point Tensor, got {getattr(video, 'dtype', type(video))}"
        )
    if video.dim() != 5 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"video: expected [B, 3, T, H, W], got {tuple(video.shape)}")
    low, high = (float(v) for v in video.detach().aminmax())
    if not (low >= 0.0 and high <= 1.0):  # not: NaN fails too
        raise ValueError(f"video: expected values in [0, 1], got {low} to {high}")


def _rows(found: Any, count: int) -> Tensor:
    """A network's answer as float32 [count, D]: what follows the second axis is averaged."""
    if not isinstance(found, Tensor) or found.dim() < 2 or found.shape[0] != count:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"network: expected features [{count}, D] or [{count}, D, ...], got {got}; "
            "is it the right network?"
        )
    rows = found.float().flatten(2).mean(2) if found.dim() > 2 else found.float()
    check_features("network", rows)
    return rows


def load_network(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Network:
    """A TorchScript file, ready for inference on `device`. Such a file is a program: trust its source.

    Raises FileFormatError for a missing or foreign file (weights alone are no network).
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; give a TorchScript network (torch.jit.save)")
    try:
        network = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        raise FileFormatError(
            f"{path}: is no TorchScript network; save one with torch.jit.save "
            "(a file of weights alone does not say how to compute)"
        ) from error
    return network.eval()  # type: ignore[no-any-return]


def call_options(network: Network) -> dict[str, Any]:
    """Keyword arguments that make a known kind of TorchScript network return raw features.

    The I3D and Inception files in circulation (StyleGAN-V, StyleGAN3) return class probabilities
    unless their forward is told `return_features=True`.
    """
    schema = getattr(getattr(network, "forward", None), "schema", None)
    names = {argument.name for argument in schema.arguments} if schema is not None else set()
    return {"return_features": True} if "return_features" in names else {}
