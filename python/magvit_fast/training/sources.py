"""From a recipe's [data] to batches on the way to a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from magvit_fast.data.clips import Augmentation, ClipSource, Sample, SceneClips, VideoClips
from magvit_fast.data.order import BatchOrder, Draw
from magvit_fast.training.config import DataConfig


def open_clips(config: DataConfig, seed: int, *, quiet: bool = False) -> ClipSource:
    """The data set that a recipe names. Raises FileFormatError when it has no usable video.

    quiet: leave the warnings about unusable files to another process.
    """
    if config.image_path:
        clips = open_clips(replace(config, image_path=""), seed, quiet=quiet)
        images = replace(config, actions=False)  # which images have none of
        return JointSource(clips, _video_clips(images, config.image_path, 1, seed, quiet))
    if config.source != "videos":
        return SceneClips(
            config.scenes,
            frames=config.frames,
            size=config.size,
            labels=config.labels,
            calm=config.source == "calm-scenes",
        )
    return _video_clips(config, config.path, config.frames, seed, quiet)


def _video_clips(config: DataConfig, path: str, frames: int, seed: int, quiet: bool) -> VideoClips:
    return VideoClips(
        path,
        frames=frames,
        size=config.size,
        augmentation=Augmentation(config.crop_scale, config.flip, config.strides),
        labels=config.labels,
        actions=config.actions,
        seed=seed,
        quiet=quiet,
    )


class JointSource:
    """Clips of one data set and stills of another (see data.clips.ClipSource)."""

    def __init__(self, clips: ClipSource, images: ClipSource) -> None:
        self.clips, self.images = clips, images
        self.num_clips, self.num_stills = clips.num_clips, images.num_stills
        self.class_names = clips.class_names
        self.identity = f"{clips.identity} and images {images.identity}"

    def __getitem__(self, draw: Draw) -> Sample:
        return (self.images if draw.still else self.clips)[draw]


def batch_loader(source: Any, order: BatchOrder, start: int, stop: int, workers: int) -> Any:
    """A torch DataLoader over batches start .. stop - 1 of the order."""
    return DataLoader(
        source,
        batch_sampler=_Batches(order, start, stop),
        num_workers=workers,
        pin_memory=torch.accelerator.is_available(),
    )


class _Batches:
    """The batch sampler that a DataLoader wants: iterable, with a length."""

    def __init__(self, order: BatchOrder, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __iter__(self) -> Any:
        return self.order.batches(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start
