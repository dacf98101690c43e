"""Clips to train on and held-out clips to measure on: rendered scenes, or the user's videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast.data.calm_scenes import calm_scene_class, render_calm_clip
from magvit_fast.data.clips import VIDEO_SUFFIXES, Augmentation, VideoClips, list_files
from magvit_fast.data.order import Draw
from magvit_fast.data.synthetic import (
    HELD_OUT_SEEDS,
    SCENE_CLASSES,
    TUNING_SEEDS,
    render_clip,
    scene_class,
)

_FRAMES = 17  # of a held-out clip; shorter ones are its first frames
_EVERY = 5  # every fifth video is held out
# [data] sources of the recipes that need no files: what draws a clip, what tells its class.
RENDERERS = {
    "scenes": (render_clip, scene_class),
    "calm-scenes": (render_calm_clip, calm_scene_class),
}


@dataclass(frozen=True)
class HeldOut:
    """video float32 [B, 3, T, S, S] in [0, 1]; classes int64 [B]."""

    video: Tensor
    classes: Tensor


class Clips:
    """Where the clips of a run come from.

    videos: a folder of video files, whose subfolders are the classes; None: rendered scenes, whose
    classes are the colors of their floors (scenes: a name of RENDERERS). Every fifth file, in sorted
    order, is held out; `work` keeps the two lists.

    Raises ValueError for fewer than two videos, FileFormatError for unusable ones.
    """

    def __init__(self, videos: Path | None, work: Path, scenes: str = "calm-scenes") -> None:
        self._scenes = scenes
        self._lists: tuple[Path, Path] | None = None
        self.class_names: tuple[str, ...] = SCENE_CLASSES
        if videos is not None:
            files = [f.resolve() for f in list_files(videos) if f.suffix.lower() in VIDEO_SUFFIXES]
            if len(files) < 2:
                raise ValueError(f"videos: expected at least 2 files in {videos}, got {len(files)}")
            held_out = files[_EVERY - 1 :: _EVERY] or files[-1:]
            self._lists = work / "train.txt", work / "held_out.txt"
            work.mkdir(parents=True, exist_ok=True)
            train = [f for f in files if f not in held_out]
            for path, names in zip(self._lists, (train, held_out), strict=True):
                path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            self.class_names = tuple(sorted({f.parent.name for f in train}))

    @property
    def description(self) -> str:
        return f"rendered {self._scenes}" if self._lists is None else "the user's videos"

    def data(self) -> dict[str, Any]:
        """What a recipe's [data] says about the source."""
        if self._lists is None:
            return {"source": self._scenes, "labels": True}
        return {"source": "videos", "path": str(self._lists[0]), "labels": True}

    def held_out(self, count: int, frames: int, size: int) -> HeldOut:
        """Clips that no model was trained on; the same ones, cut shorter, for any frames <= 17."""
        return self._take(1, HELD_OUT_SEEDS, count, frames, size)

    def reference(self, count: int, frames: int, size: int) -> Tensor:
        """Other real clips, to scale features by: tuning scenes, or (of videos) training clips."""
        return self._take(0, TUNING_SEEDS, count, frames, size).video

    def _take(self, part: int, seeds: range, count: int, frames: int, size: int) -> HeldOut:
        if frames > _FRAMES:
            raise ValueError(f"frames: expected at most {_FRAMES}, got {frames}")
        if self._lists is None:
            render, class_of = RENDERERS[self._scenes]
            chosen = seeds[:count]
            clips = [torch.from_numpy(render(seed, frames, size)) for seed in chosen]
            video = torch.stack(clips).permute(0, 4, 1, 2, 3).float() / 255
            return HeldOut(video.contiguous(), torch.tensor([class_of(s) for s in chosen]))
        plain = Augmentation(crop_scale=(1.0, 1.0), flip=False)
        source = VideoClips(
            self._lists[part], frames=_FRAMES, size=size, augmentation=plain, labels=True
        )
        draws = [divmod(i, source.num_clips) for i in range(count)]
        samples = [source[Draw(epoch, index)] for epoch, index in draws]
        names = [source.class_names[sample["class_id"]] for sample in samples]
        known = [self.class_names.index(n) if n in self.class_names else 0 for n in names]
        video = torch.stack([sample["video"][:, :frames] for sample in samples])
        return HeldOut(video, torch.tensor(known))
