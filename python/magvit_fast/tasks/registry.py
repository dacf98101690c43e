"""The ten tasks of MAGVIT: which pixels are given, what fills the rest, which tokens condition.

Sources: MAGVIT appendix B.1 and table 12. Where the paper and the released code differ the rule
that gives the published token fractions is followed (the latent-grid rule for moving windows).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from magvit_fast.tasks import regions
from magvit_fast.tasks.regions import Fill, Grid, Region


@dataclass(frozen=True)
class ClipGeometry:
    """A clip's size in pixels and in tokens.

    causal: slot 0 holds the first frame alone and slot s the s-th group of `temporal stride` frames
    after it (MAGVIT-v2: 17 frames, 5 slots). Otherwise slots hold equal groups (MAGVIT: 16 frames,
    4 slots).
    looks_ahead: the tokens of a causal clip depend on the frames behind their slot all the same
    (norms that span the clip, as in Open-MAGVIT2).
    """

    frames: int
    height: int
    width: int
    grid: Grid
    causal: bool
    looks_ahead: bool = False

    def __post_init__(self) -> None:
        slots = self.grid[0]
        if min(self.frames, self.height, self.width, *self.grid) < 1:
            raise ValueError(f"geometry: expected positive sizes, got {self}")
        steps = (self.frames - 1, slots - 1) if self.causal else (self.frames, slots)
        if steps[0] != 0 and (steps[1] == 0 or steps[0] % steps[1]):
            raise ValueError(
                f"frames: {self.frames} frames do not divide into {slots} "
                f"{'causal (1 + k*s)' if self.causal else 'equal'} slots"
            )

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def time_stride(self) -> int:
        """Frames of a slot (but for the single frame of a causal clip's first one)."""
        return max(1, (self.frames - self.causal) // max(1, self.grid[0] - self.causal))

    @property
    def size(self) -> Grid:
        return self.frames, self.height, self.width

    def slots_of_first(self, frames: int) -> int:
        """Number of leading slots that hold at least one of the first `frames` frames."""
        if not self.causal:
            return math.ceil(frames * self.grid[0] / self.frames)
        return 1 + math.ceil((frames - 1) / self.time_stride)

    def slots_of_last(self, frames: int) -> int:
        """Number of trailing slots that hold at least one of the last `frames` frames."""
        return min(self.grid[0], math.ceil(frames / self.time_stride))


@dataclass(frozen=True)
class Task:
    """A generation task. The base class has no condition but the class (class_generation).

    prompt: name of the task row in models that share rows between tasks (the released code does:
    one for all outpainting); models may also have a row under the task's own name (the paper).
    """

    name: str
    prompt: str
    class_conditional: bool = False

    @property
    def has_condition(self) -> bool:
        """Whether the task needs a video."""
        return False

    def min_frames(self, geometry: ClipGeometry) -> int:
        """How many frames of video the condition needs."""
        return 0

    def condition_name(self, geometry: ClipGeometry) -> str:
        """Tasks of one name here have the same condition video (with and without a class, say)."""
        return self.name

    def condition_video(self, video: Tensor, geometry: ClipGeometry) -> Tensor:
        """The clip whose tokens are z~: given pixels of `video` [B, C, T, H, W], rest filled."""
        raise ValueError(f"task {self.name} takes no condition video")

    def pixel_mask(self, geometry: ClipGeometry) -> Tensor:
        """bool [T, H, W], True where the pixel is given."""
        return torch.zeros(geometry.size, dtype=torch.bool)

    def token_mask(self, geometry: ClipGeometry) -> Tensor:
        """bool [T', H', W'], True where the token is a condition token."""
        return torch.zeros(geometry.grid, dtype=torch.bool)

    def check_video(self, video: Tensor, geometry: ClipGeometry) -> None:
        """Raises ValueError for a video that the condition cannot be made from."""
        least = self.min_frames(geometry)
        if video.dim() != 5:
            raise ValueError(f"video: expected [B, C, T, H, W], got {tuple(video.shape)}")
        if video.shape[2] < least:
            raise ValueError(
                f"video: task {self.name} needs at least {least} frames, got {video.shape[2]}"
            )
        if tuple(video.shape[3:]) != (geometry.height, geometry.width):
            raise ValueError(
                f"video: expected {geometry.height}x{geometry.width} pixels, "
                f"got {video.shape[3]}x{video.shape[4]}"
            )


@dataclass(frozen=True)
class FrameTask(Task):
    """Whole frames are given: `first` leading ones and `last` trailing ones.

    first None means the published choice: 5 for a causal tokenizer (exactly slots 0 and 1), else 1.
    A slot is a condition slot when it holds a given frame, the paper's rule; slots sets the number
    of leading ones by hand (the released code's setting, whose default is 1: with 5 of 16 given
    frames the paper's rule gives 2). With dataclasses.replace(task, first=k) any number goes.
    """

    first: int | None = None
    last: int = 0
    slots: int | None = None

    @property
    def has_condition(self) -> bool:
        return True

    def num_first(self, geometry: ClipGeometry) -> int:
        """Leading frames given."""
        count = self.first if self.first is not None else (5 if geometry.causal else 1)
        if count < 1 or count + self.last >= geometry.frames:
            raise ValueError(
                f"task {self.name}: expected at least 1 leading frame and {count} + {self.last} "
                f"given frames below the clip's {geometry.frames}"
            )
        return count

    def min_frames(self, geometry: ClipGeometry) -> int:
        return self.num_first(geometry) + self.last

    def condition_name(self, geometry: ClipGeometry) -> str:
        return f"first{self.num_first(geometry)}" + (f"_last{self.last}" if self.last else "")

    def condition_video(self, video: Tensor, geometry: ClipGeometry) -> Tensor:
        self.check_video(video, geometry)
        given = video[:, :, : self.num_first(geometry)]
        end = video.shape[2]
        return regions.frames_between(given, video[:, :, end - self.last : end], geometry.frames)

    def pixel_mask(self, geometry: ClipGeometry) -> Tensor:
        mask = torch.zeros(geometry.size, dtype=torch.bool)
        mask[: self.num_first(geometry)] = True
        mask[geometry.frames - self.last :] = True
        return mask

    def token_mask(self, geometry: ClipGeometry) -> Tensor:
        mask = torch.zeros(geometry.grid, dtype=torch.bool)
        slots = self.slots
        if slots is None:
            slots = geometry.slots_of_first(self.num_first(geometry))
        elif not 1 <= slots <= geometry.grid[0]:
            raise ValueError(
                f"task {self.name}: expected 1 to {geometry.grid[0]} condition slots, got {slots}"
            )
        mask[:slots] = True
        if self.last:
            mask[-geometry.slots_of_last(self.last) :] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class RegionTask(Task):
    """A part of every frame is given: outpainting (a region) or inpainting (all but a region)."""

    region: Region
    fill: Fill

    @property
    def has_condition(self) -> bool:
        return True

    def min_frames(self, geometry: ClipGeometry) -> int:
        return geometry.frames

    def condition_video(self, video: Tensor, geometry: ClipGeometry) -> Tensor:
        self.check_video(video, geometry)
        return self.fill(video[:, :, : geometry.frames])

    def pixel_mask(self, geometry: ClipGeometry) -> Tensor:
        return self.region(geometry.size)

    def token_mask(self, geometry: ClipGeometry) -> Tensor:
        return self.region(geometry.grid)


def _replicated(name: str, region: Region) -> RegionTask:
    return RegionTask(name, "outpainting", region=region, fill=regions.replicate_around(region))


def _blacked(name: str, prompt: str, region: Region) -> RegionTask:
    return RegionTask(name, prompt, region=region, fill=regions.black_outside(region))


_ALL = (
    FrameTask("frame_prediction", "frame_prediction"),
    FrameTask("frame_interpolation", "frame_interpolation", first=1, last=1),
    _replicated("outpainting_central", regions.central),
    _replicated("outpainting_vertical", regions.vertical_strip),
    _replicated("outpainting_horizontal", regions.horizontal_strip),
    _blacked("outpainting_dynamic", "outpainting", regions.moving_strip),
    _blacked("inpainting_central", "inpainting", regions.complement(regions.central)),
    _blacked("inpainting_dynamic", "inpainting", regions.complement(regions.moving_hole)),
    Task("class_generation", "full_generation", class_conditional=True),
    FrameTask("class_frame_prediction", "frame_prediction", class_conditional=True),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})


def get_task(name: str) -> Task:
    """The task of that name; a ValueError lists the names otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"task: expected a name or a Task, got {type(name).__name__}")
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
