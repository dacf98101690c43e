"""A data set of clips over video files, and the same face for rendered scenes.

An item is asked for by a `Draw` (see order.py) and depends on nothing but the data set's settings
and that draw: no state is carried from item to item, so any number of loader workers gives the same
batches.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from magvit_fast.data.actions import action_file, read_actions
from magvit_fast.data.calm_scenes import calm_scene_class, render_calm_clip
from magvit_fast.data.index import FileFacts, index_files
from magvit_fast.data.order import Draw
from magvit_fast.data.seeking import Keyframes
from magvit_fast.data.synthetic import SCENE_CLASSES, TRAIN_SEEDS, render_clip, scene_class
from magvit_fast.data.video import center_crop_resize, read_video
from magvit_fast.errors import FileFormatError

log = logging.getLogger("magvit_fast")

VIDEO_SUFFIXES = frozenset(
    [
        ".avi",
        ".gif",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
IMAGE_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".webp"])
_NAMES_IN_WARNING = 20


class _Sample(TypedDict):
    video: Tensor
    class_id: int
    replaced: int


class Sample(_Sample, total=False):
    """video float32 [3, T, H, W] in [0, 1] (T = 1 for a still); class_id -1 without labels;
    replaced: how many files could not be decoded and were passed over on the way to this one;
    actions float32 [T, A] where the data set has them."""

    actions: Tensor


class ClipSource(Protocol):
    """What the training loops need of a data set: two pools of entries, addressed by draws."""

    @property
    def num_clips(self) -> int: ...

    @property
    def num_stills(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> str: ...  # equal for equal items

    def __getitem__(self, draw: Draw) -> Sample: ...


@dataclass(frozen=True)
class Augmentation:
    """How a window is cut out of a video.

    crop_scale: side of the window as a share of the largest one that fits, drawn uniformly from
        this range.
    flip: mirror left-right in half of the draws.
    strides: steps between the frames taken, drawn uniformly from those that the video is long
        enough for.
    """

    crop_scale: tuple[float, float] = (0.8, 1.0)
    flip: bool = True
    strides: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale: expected 0 < low <= high <= 1, got {self.crop_scale}")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides: expected at least one step >= 1, got {self.strides}")


class VideoClips:
    """Clips of `frames` frames and `size` pixels, cut at random from video files.

    path: a folder (searched recursively for video and image files) or a text file that lists one
        path a line, relative to itself. Damaged files are passed over with one warning that names
        them; image files and videos too short for a clip serve as stills.
    frames: 1 + 4k for the causal tokenizer (checked by the model, not here).
    size: (height, width) or one number for both. The window cut out has this aspect ratio.
    labels: the name of a file's parent folder is its class, numbered in sorted order.
    actions: every video has an array of actions beside it (see data/actions.py); one without, or
        with a bad one or one of another width than the first, is passed over like a damaged file.
        Needs strides (1,) and flip False: actions know neither skipped frames nor a mirror.
    quiet: no warnings about files that are unusable from the start (another process gives them).

    Raises FileFormatError when no usable file is left.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        frames: int = 17,
        size: int | tuple[int, int] = 128,
        augmentation: Augmentation = Augmentation(),
        labels: bool = False,
        actions: bool = False,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        if frames < 1:
            raise ValueError(f"frames: expected at least 1, got {frames}")
        if actions and (augmentation.flip or augmentation.strides != (1,)):
            raise ValueError(
                "augmentation: expected flip False and strides (1,) with actions, "
                f"got {augmentation.flip} and {augmentation.strides}"
            )
        self.frames, self.seed, self.augmentation = frames, seed, augmentation
        self.actions = actions
        self.size = (size, size) if isinstance(size, int) else size
        found = list_files(path)
        if not found:
            raise FileFormatError(
                f"{path}: no usable video: it names no video or image file "
                f"({', '.join(sorted(VIDEO_SUFFIXES))})"
            )
        usable = _usable(found, logging.DEBUG if quiet else logging.WARNING, actions=actions)
        self.files = [file for file in found if file in usable]
        self.lengths = [usable[file].frames for file in self.files]
        # flat: of a large set there may be millions
        keyframes = [usable[file].keyframes for file in self.files]
        self._keyframe_ends = np.cumsum([len(keys) for keys in keyframes])
        self._keyframes = np.array(list(itertools.chain(*keyframes)), np.int64).reshape(-1, 2)
        shortest = (frames - 1) * min(augmentation.strides) + 1
        self._clips = [i for i, length in enumerate(self.lengths) if length >= shortest]
        self._warned: set[Path] = set()
        if not self._clips:
            raise FileFormatError(
                f"{path}: no usable video among {len(found)} files: each is damaged or has fewer "
                f"than {shortest} frames; give longer videos or ask for fewer frames"
            )
        if len(self._clips) < len(self.files):
            log.log(
                logging.DEBUG if quiet else logging.WARNING,
                "%s: %d of %d files are shorter than %d frames and serve as stills only",
                path, len(self.files) - len(self._clips), len(self.files), shortest,
            )  # fmt: skip
        self.class_names = (
            tuple(sorted({file.parent.name for file in self.files})) if labels else ()
        )

    @property
    def num_clips(self) -> int:
        return len(self._clips)

    @property
    def num_stills(self) -> int:
        return len(self.files)

    @property
    def identity(self) -> str:
        """Hash of everything that items depend on but the files' content."""
        files = [(str(f), n) for f, n in zip(self.files, self.lengths, strict=True)]
        facts = [files, self.frames, self.size, self.seed, asdict(self.augmentation)]
        facts += ["actions"] * self.actions
        facts += [["classes", *self.class_names]] * bool(self.class_names)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __getitem__(self, draw: Draw) -> Sample:
        """The clip of this draw. A file that cannot be decoded gives way to the next one."""
        pool: Sequence[int] = range(len(self.files)) if draw.still else self._clips
        for replaced in range(len(pool)):
            number = pool[(draw.index + replaced) % len(pool)]
            rng = np.random.default_rng([self.seed, draw.epoch, draw.index, int(draw.still)])
            try:
                sample = self._cut(number, 1 if draw.still else self.frames, rng)
            except FileFormatError as error:
                self._warn(self.files[number], error)
                continue
            sample["replaced"] = replaced
            return sample
        raise FileFormatError(
            f"{self.files[pool[0]].parent}: none of {len(pool)} files can be decoded; "
            "see the warnings above, re-encode or download them again"
        )

    def _cut(self, number: int, frames: int, rng: np.random.Generator) -> Sample:
        length, options = self.lengths[number], self.augmentation
        fitting = [s for s in options.strides if (frames - 1) * s < length]
        stride = int(rng.choice(fitting))
        start = int(rng.integers(length - (frames - 1) * stride))
        scale = rng.uniform(*options.crop_scale)
        place = rng.random(2)
        mirrored = options.flip and rng.random() < 0.5
        video = read_video(
            self.files[number], frames=frames, start=start, stride=stride,
            keyframes=self._keyframes_of(number),
        )  # fmt: skip
        video = cut_window(video, self.size, scale, (place[0], place[1]))
        video = video.flip(-1) if mirrored else video
        sample: Sample = {"video": video, "class_id": self._class(number), "replaced": 0}
        if self.actions:
            rows = read_actions(self.files[number], length)
            sample["actions"] = rows[start : start + frames].clone()
        return sample

    def _keyframes_of(self, number: int) -> Keyframes:
        end = int(self._keyframe_ends[number])
        first = int(self._keyframe_ends[number - 1]) if number else 0
        return tuple((int(n), int(time)) for n, time in self._keyframes[first:end])

    def _class(self, number: int) -> int:
        return self.class_names.index(self.files[number].parent.name) if self.class_names else -1

    def _warn(self, file: Path, error: FileFormatError) -> None:
        if file not in self._warned:
            self._warned.add(file)
            log.warning("skipped: %s", error)


class SceneClips:
    """Rendered scenes (synthetic.py) as a source: entry i is the training scene `first + i`.

    labels: a scene's class is that of synthetic.scene_class. calm: the scenes of calm_scenes.py.
    """

    def __init__(
        self,
        count: int,
        *,
        frames: int = 17,
        size: int = 64,
        first: int = TRAIN_SEEDS.start,
        labels: bool = False,
        calm: bool = False,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least one scene, got {count}")
        self.num_clips = self.num_stills = count
        self.frames, self.size, self.first = frames, size, first
        self.class_names = SCENE_CLASSES if labels else ()
        self._render, self._class = (
            (render_calm_clip, calm_scene_class) if calm else (render_clip, scene_class)
        )
        kind = f"{'labeled ' if labels else ''}{'calm ' if calm else ''}scenes"
        self.identity = f"{kind} from {first}, {frames} frames of {size} pixels"

    def __getitem__(self, draw: Draw) -> Sample:
        seed = self.first + draw.index
        clip = self._render(seed, self.frames, self.size)  # uint8 [T, H, W, 3]
        if draw.still:
            frame = np.random.default_rng([draw.epoch, draw.index]).integers(self.frames)
            clip = clip[frame : frame + 1]
        video = torch.from_numpy(clip).permute(3, 0, 1, 2).float().div_(255.0).contiguous()
        class_id = self._class(seed) if self.class_names else -1
        return {"video": video, "class_id": class_id, "replaced": 0}


def list_files(path: str | os.PathLike[str]) -> list[Path]:
    """Video and image files below a folder, sorted; or those a list file names, in its order."""
    path = Path(path)
    if path.is_dir():
        known = VIDEO_SUFFIXES | IMAGE_SUFFIXES
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return [path]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{path}: expected a folder of videos or a text file with a path a line ({error})"
        ) from error
    return [path.parent / line.strip() for line in lines if line.strip()]


def _usable(files: list[Path], level: int, *, actions: bool = False) -> dict[Path, FileFacts]:
    """Facts of the files that can be read (and their actions); the others are named in one log entry."""
    facts = index_files(files)
    widths: dict[Path, int] = {}
    for i, (file, found) in enumerate(zip(files, facts, strict=True)):
        if actions and isinstance(found, FileFacts):
            try:
                widths[file] = read_actions(file, found.frames).shape[1]
            except FileFormatError as error:
                facts[i] = error
    width = next((widths[file] for file in files if file in widths), 0)
    for i, file in enumerate(files):
        if widths.get(file, width) != width:
            facts[i] = FileFormatError(
                f"{action_file(file)}: its actions have {widths[file]} numbers, those of the first "
                f"video {width}"
            )
    bad = [str(error) for error in facts if isinstance(error, FileFormatError)]
    if bad:
        more = (
            f"\n  ... and {len(bad) - _NAMES_IN_WARNING} more"
            if len(bad) > _NAMES_IN_WARNING
            else ""
        )
        log.log(
            level,
            "skipped %d of %d files:\n  %s%s",
            len(bad), len(files), "\n  ".join(bad[:_NAMES_IN_WARNING]), more,
        )  # fmt: skip
    return {f: c for f, c in zip(files, facts, strict=True) if isinstance(c, FileFacts)}


def cut_window(
    video: Tensor, size: tuple[int, int], scale: float, place: tuple[float, float]
) -> Tensor:
    """Cut a window of the target's aspect ratio out of [3, T, H, W], resize it to `size`.

    scale: its side as a share of the largest that fits. place: (vertical, horizontal) position in
    the room that is left, in [0, 1].
    """
    height, width = video.shape[-2:]
    unit = min(height / size[0], width / size[1]) * scale
    crop_h = max(1, min(height, round(size[0] * unit)))
    crop_w = max(1, min(width, round(size[1] * unit)))
    top = min(int(place[0] * (height - crop_h + 1)), height - crop_h)
    left = min(int(place[1] * (width - crop_w + 1)), width - crop_w)
    window = video[..., top : top + crop_h, left : left + crop_w]
    return center_crop_resize(window.movedim(0, 1), size).movedim(1, 0).contiguous()
