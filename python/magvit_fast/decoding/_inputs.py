"""What generation checks and sets before it runs: video, classes, devices, evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from magvit_fast.models.masked_transformer import TokenTransformer
from magvit_fast.ops._checks import check_int
from magvit_fast.tasks.registry import ClipGeometry, FrameTask, Task


class Tokenizer(Protocol):
    """What generation needs of a video tokenizer (MagvitV2Tokenizer has it).

    config.num_bits: bits of an id; config.time_stride, config.space_stride: frames and pixels per
    slot. A tokenizer is causal (1 + s*k frames) unless config.causal says otherwise,
    and its tokens see no later frames unless config.streams is False.
    """

    config: Any

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, ids: Tensor) -> Tensor: ...


def checked_video(task: Task, geometry: ClipGeometry, video: Tensor | None) -> Tensor | None:
    if not task.has_condition:
        if video is not None:
            raise ValueError(f"video: expected None, task {task.name} takes no video")
        return None
    if video is None:
        raise ValueError(
            f"video: task {task.name} needs one of at least {task.min_frames(geometry)} frames of "
            f"{geometry.height}x{geometry.width}, got None"
        )
    check_pixels("video", video, geometry)
    task.check_video(video, geometry)
    return video


def check_pixels(name: str, pixels: Tensor, geometry: ClipGeometry) -> None:
    """Floating, the last two axes of the models' size, values in [0, 1]; else the error that says so."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"{name}: expected a floating-point Tensor, got {kind}")
    height, width = geometry.height, geometry.width
    if pixels.dim() >= 2 and tuple(pixels.shape[-2:]) != (height, width):
        raise ValueError(
            f"{name}: expected {height}x{width} pixels (the transformer's {geometry.grid[1]}x"
            f"{geometry.grid[2]} tokens through this tokenizer), got "
            f"{pixels.shape[-2]}x{pixels.shape[-1]}; resize it, or give a MaskedTransformer for "
            "other sizes by with_grid"
        )
    if pixels.numel():
        low, high = (float(v) for v in pixels.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):  # not: NaN fails too
            raise ValueError(f"{name}: expected values in [0, 1], got {low} to {high}")


def checked_classes(
    task: Task,
    transformer: TokenTransformer,
    class_id: int | Sequence[int] | Tensor | None,
    batch: int | None,
) -> Tensor | None:
    count = transformer.config.num_classes
    if not task.class_conditional:
        if class_id is not None:
            raise ValueError(f"class_id: expected None, task {task.name} takes no class")
        return None
    if count == 0:
        raise ValueError(f"transformer: it has no classes, but task {task.name} needs one")
    if class_id is None:
        raise ValueError(f"class_id: task {task.name} needs one in 0..{count - 1}, got None")
    try:
        classes = torch.as_tensor(class_id).reshape(-1).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_id: expected an int or ints, got {class_id!r}") from error
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise TypeError(f"class_id: expected ints, got {classes.dtype}")
    if not isinstance(class_id, int) and batch not in (None, len(classes)):
        raise ValueError(f"class_id: expected one id or {batch}, got {len(classes)}")
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        raise ValueError(f"class_id: expected ids in 0..{count - 1}, got {classes.tolist()}")
    if isinstance(class_id, int) and batch is not None:
        classes = classes.expand(batch)
    return classes.to(transformer.position_embedding.device, torch.int64)


def check_devices(tokenizer: Tokenizer, transformer: nn.Module, video: Tensor | None) -> None:
    device = next(transformer.parameters()).device
    if isinstance(tokenizer, nn.Module):
        other = next(tokenizer.parameters()).device
        if other != device:
            raise ValueError(
                f"tokenizer: expected device {device} (the transformer's), got {other}"
            )
    if video is not None and video.device != device:
        raise ValueError(f"video: expected device {device} (the models'), got {video.device}")


@contextmanager
def evaluation(*models: object) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's own mode again after it."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def count_windows(task: Task, geometry: ClipGeometry, frames: int | None) -> tuple[int, int]:
    """How many clips make `frames` frames, and by how many frames they overlap."""
    if frames is not None:
        check_int("frames", frames, least=1)
    if frames is None or frames <= geometry.frames:
        return 1, 0
    if not isinstance(task, FrameTask) or task.last:
        raise ValueError(
            f"frames: task {task.name} makes one clip of {geometry.frames} frames, got {frames}; "
            "only frame prediction goes further"
        )
    given = task.num_first(geometry)
    return 1 + math.ceil((frames - geometry.frames) / (geometry.frames - given)), given
