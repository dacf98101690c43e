"""One picture of what a pair of models does: for each task the condition, the result, the truth."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.cli.sheet import check_matplotlib
from magvit_fast.data.atomic import atomic_path
from magvit_fast.data.synthetic import demo_clip
from magvit_fast.metrics import psnr
from magvit_fast.models.transformers import VideoTransformer
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.tasks import ClipGeometry, Task

_COLUMNS = 8  # frames shown of a clip
_GAP = 0.04  # between two frames, as a share of a frame's width
_MADE = "#c03a2b"


@dataclass(frozen=True)
class TaskResult:
    """One task on one clip; videos [3, T, H, W] in [0, 1] on the CPU.

    condition: what the model was given, missing pixels filled as for the model (None: a class
        alone). result: None when the models cannot serve the task, `reason` then says why.
    class_id: where the task has one.
    """

    task: Task
    condition: Tensor | None
    result: Tensor | None
    truth: Tensor
    class_id: int | None = None
    reason: str = ""

    @property
    def psnr(self) -> float | None:
        """Of the result against the clip; None where a task resembles no one clip."""
        if self.result is None or not self.task.has_condition:
            return None
        return psnr(self.result.unsqueeze(0), self.truth.unsqueeze(0)).item()


def synthetic_video(geometry: ClipGeometry) -> Tensor:
    """The demo's scene at the size of the models: [1, 3, T, H, W] in [0, 1]."""
    height, width = geometry.height, geometry.width
    pixels = torch.from_numpy(demo_clip(geometry.frames, max(height, width)))  # [T, S, S, 3]
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    window = pixels[:, top : top + height, left : left + width]
    return window.permute(3, 0, 1, 2).unsqueeze(0).float().div(255.0)


def run_tasks(
    tokenizer: VideoTokenizer,
    transformer: VideoTransformer,
    geometry: ClipGeometry,
    tasks: Sequence[Task],
    video: Tensor,
    class_id: int,
    options: dict[str, Any],
) -> Iterator[TaskResult]:
    """Every task on one clip [1, 3, T, H, W] (on the models' device), one result after the other.

    A task that the models cannot serve (no such prompt, no classes, a prefix of another size) gives
    a result that says why; a wrong class or setting is an error.
    """
    truth = video[0].cpu()
    classes = getattr(transformer.config, "num_classes", 0)
    if classes and not 0 <= class_id < classes:
        raise ValueError(f"--class-id: expected 0 to {classes - 1}, got {class_id}")
    for task in tasks:
        condition = None
        chosen = class_id if task.class_conditional else None
        try:
            if task.has_condition:
                condition = task.condition_video(video, geometry)[0].cpu()
            made = mf.generate(
                tokenizer,
                transformer,
                task=task,
                video=video if task.has_condition else None,
                class_id=chosen,
                **options,
            )
        except (ValueError, NotImplementedError) as error:
            if _blames_settings(error):
                raise
            yield TaskResult(task, condition, None, truth, chosen, " ".join(str(error).split()))
            continue
        yield TaskResult(task, condition, made[0].float().cpu(), truth, chosen)


def _blames_settings(error: Exception) -> bool:
    """Whether the user's settings are at fault, and not what the pair of models can do."""
    return not str(error).startswith(("task", "transformer", "class_id", "video", "actions"))


def write_task_sheet(path: str | Path, results: Sequence[TaskResult], title: str) -> None:
    """Write the picture (PNG), whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FileWriteError: the destination cannot be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    columns = 2 if len(results) > 3 else 1
    lines = math.ceil(len(results) / columns)
    frames, height, width = results[0].truth.shape[1:]
    shown = _shown(frames)
    strip = len(shown) * (1 + _GAP) * width / height  # of a strip one unit high
    figure = Figure(
        figsize=(columns * (0.62 * strip + 1.5), 0.9 + lines * (3 * 0.62 + 0.42)),
        layout="constrained",
    )
    figure.suptitle(title, size=9)
    for place, (block, result) in enumerate(
        zip(figure.subfigures(lines, columns, squeeze=False).T.flat, results, strict=False)
    ):
        _draw_task(block, result, shown, numbers=place % lines == 0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _shown(frames: int) -> list[int]:
    count = min(_COLUMNS, frames)
    return [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]


def _draw_task(block: Any, result: TaskResult, shown: list[int], *, numbers: bool) -> None:
    name = result.task.name.replace("_", " ")
    if result.class_id is not None:
        name += f" (class {result.class_id})"
    block.suptitle(name, size=9, weight="bold")
    made = "result" if result.psnr is None else f"result\n{result.psnr:.1f} dB"
    truth = "truth" if result.task.has_condition else "a real clip"
    rows: list[tuple[str, Tensor | None, str]] = [
        ("condition", result.condition, "the class alone"),
        (made, result.result, _wrapped(f"not served: {result.reason}")),
        (truth, result.truth, ""),
    ]
    for axis, (label, video, words) in zip(block.subplots(3, 1), rows, strict=True):
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", size=8)
        height, width = result.truth.shape[2:]
        if video is None:
            axis.set_aspect(height / (_strip(result.truth, shown).shape[1]), adjustable="box")
            axis.text(0.5, 0.5, words, ha="center", va="center", size=7, transform=axis.transAxes)
            continue
        axis.imshow(_strip(video, shown).numpy(), interpolation="nearest")
        if label.startswith("result"):
            for spine in axis.spines.values():
                spine.set(color=_MADE, linewidth=1.2)
        if numbers and label == "condition":
            gap = max(1, round(_GAP * width))
            axis.xaxis.tick_top()
            axis.set_xticks(
                [i * (width + gap) + width / 2 for i in range(len(shown))],
                [str(frame) for frame in shown],
                size=6,
            )
            axis.tick_params(length=0, pad=1)


def _strip(video: Tensor, shown: list[int]) -> Tensor:
    """Frames side by side with white between them: [3, T, H, W] -> [H, W', 3]."""
    height, width = video.shape[2:]
    bar = video.new_ones(3, height, max(1, round(_GAP * width)))
    pieces = [piece for frame in shown for piece in (video[:, frame], bar)]
    return torch.cat(pieces[:-1], dim=2).permute(1, 2, 0)


def _wrapped(words: str, width: int = 90) -> str:
    return "\n".join(textwrap.wrap(words, width))


def task_rows(results: Sequence[TaskResult]) -> dict[str, str]:
    """For people: task -> its score, or why there is no result."""
    rows = {}
    for result in results:
        if result.result is None:
            rows[result.task.name] = f"not served: {result.reason}"
        else:
            rows[result.task.name] = "made" if result.psnr is None else f"{result.psnr:.2f} dB PSNR"
    return rows
