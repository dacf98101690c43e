"""`magvit-fast generate --task ...`: continue, fill or invent a clip; a sheet of all the tasks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast.cli.clips import read_clip
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import (
    DEMO_MODEL,
    Outcome,
    add_tokenizer_option,
    add_transformer_option,
    check_output,
    check_result_name,
    frame_size,
    implementation,
    load_tokenizer,
    load_transformer,
    positive_int,
    running,
    table,
    write_result,
)
from magvit_fast.cli.sheet import check_matplotlib
from magvit_fast.cli.task_sheet import run_tasks, synthetic_video, task_rows, write_task_sheet
from magvit_fast.data.actions import read_action_array
from magvit_fast.data.synthetic import DEMO_SEED, SCENE_CLASSES, scene_class
from magvit_fast.data.video import probe
from magvit_fast.decoding import Guidance, clip_geometry, generate_stream, published
from magvit_fast.decoding.published import PUBLISHED_NAMES
from magvit_fast.errors import FileFormatError
from magvit_fast.models import (
    AutoregressiveTransformer,
    MaskedTransformer,
    VideoTokenizer,
    VideoTransformer,
)
from magvit_fast.tasks import CONDITION_MODES, TASKS, ClipGeometry, FrameTask, Task, get_task

# MAGVIT, section 3.3 and table 10.
_PAPER: dict[str, Any] = {
    "steps": 12,
    "schedule": "cosine",
    "choice_temperature": 4.5,
    "temperature": 1.0,
    "guidance": 0.0,
    "seed": 0,
    "condition_mode": "commit",
}
HELP = "Generate a video: predict frames, fill regions, or from a class."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, choices=(*TASKS, "all"))
    parser.add_argument(
        "-o", "--output", metavar="VIDEO", help=".mp4 file (H.264); .png for a single image"
    )
    parser.add_argument(
        "--size", type=frame_size, metavar="HxW",
        help="of the result, other than the transformer was trained for (see --positions)",
    )  # fmt: skip
    parser.add_argument(
        "--positions", choices=("corner", "interpolate"), default="corner",
        help="how --size uses the learned positions: the corner of a larger grid (default), or "
        "interpolated to any grid",
    )  # fmt: skip
    parser.add_argument(
        "--sheet", metavar="PNG",
        help="in place of a video: condition, result and truth of the task, or of all ten; without "
        "--video on a rendered scene",
    )  # fmt: skip
    parser.add_argument("--video", metavar="FILE", help="what is given (tasks with a condition)")
    parser.add_argument("--start", type=int, default=0, help="first frame taken from it")
    parser.add_argument(
        "--frames", type=positive_int, help="of the result (default: one clip of the model)"
    )
    parser.add_argument("--class-id", type=int, help="class (tasks with a class)")
    parser.add_argument(
        "--given", type=positive_int, metavar="N",
        help="frames given at the front (default: 5 of a causal tokenizer, else 1)",
    )  # fmt: skip
    parser.add_argument(
        "--goal", metavar="FILE", help="image or video whose first frame is to end it (MaskViT)"
    )
    parser.add_argument(
        "--actions", metavar="FILE",
        help=".npy or .npz, one row a frame of --video (MaskViT with actions)",
    )  # fmt: skip
    parser.add_argument("--fps", type=float, help="of the result (default: of --video, else 25)")
    add_tokenizer_option(parser)
    add_transformer_option(parser)
    add_decoding_options(parser)


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "masked decoding", "defaults: those found for the model that comes along, else the paper's"
    )
    group.add_argument(
        "--settings", choices=PUBLISHED_NAMES, metavar="NAME",
        help="start from a paper's: " + ", ".join(PUBLISHED_NAMES),
    )  # fmt: skip
    group.add_argument("--steps", type=positive_int, help="passes (12)")
    group.add_argument("--schedule", help="mask schedule (cosine)")
    group.add_argument("--choice-temperature", type=float, help="noise on the confidence (4.5)")
    group.add_argument("--temperature", type=float, help="of the sampled tokens (1)")
    group.add_argument("--guidance", type=float, help="classifier-free guidance (0)")
    group.add_argument("--seed", type=int, help="of the random draws (0)")
    group.add_argument(
        "--condition-mode", choices=CONDITION_MODES,
        help="what becomes of condition tokens: as the model was trained (commit)",
    )  # fmt: skip


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of mf.generate: the command line's, else those of --settings, else the shipped
    model's, else MAGVIT's."""
    options = dict(_PAPER)
    if args.settings is not None:
        options |= published(args.settings)
    elif args.transformer is None:
        options |= shipped_decoding()
    given = {name: value for name in _PAPER if (value := getattr(args, name)) is not None}
    if "guidance" in given and isinstance(options["guidance"], Guidance):  # its schedule stays
        given["guidance"] = dataclasses.replace(options["guidance"], scale=given["guidance"])
    return options | given


def shipped_decoding() -> dict[str, Any]:
    """Decoding settings of the model that comes along (demo.json beside its weights)."""
    path = DEMO_MODEL / "demo.json"
    if not path.is_file():
        return {}
    settings = json.loads(path.read_text(encoding="utf-8"))["decoding"]
    return {name: value for name, value in settings.items() if name in _PAPER}


def run(args: argparse.Namespace) -> Outcome:
    if (args.output is None) == (args.sheet is None):
        raise ValueError("--output: expected either -o VIDEO or --sheet PNG")
    if args.sheet is not None:
        return _sheet(args)
    if args.task == "all":
        raise ValueError("--task: all ten go into a picture; give --sheet PNG in place of -o")
    with running(args) as device:
        tokenizer = load_tokenizer(args.tokenizer, device)
        transformer = load_transformer(args.transformer, device)
        check_output(args.output, args.video, args.goal, args.actions)
        transformer = _of_size(args, tokenizer, transformer)
        task, geometry = _task(args), clip_geometry(tokenizer, transformer)
        check_result_name(args.output, args.frames or geometry.frames)
        given = _given(args, task, geometry)
        options = decoding_options(args)
        began = time.perf_counter()
        fps = args.fps or (probe(args.video).fps if args.video else 25.0)
        with _passes_shown(transformer, options, known=args.frames is None):
            pieces = generate_stream(
                tokenizer,
                transformer,
                task=task,
                video=None if given is None else given.to(device),
                class_id=args.class_id,
                goal=_goal(args.goal, geometry, device),
                actions=_actions(args, args.frames or geometry.frames, device),
                frames=args.frames,
                **options,
            )
            frames = (frame for piece in pieces for frame in piece[0].cpu().unbind(dim=1))
            count = write_result(args.output, frames, args.frames or geometry.frames, fps)
        elapsed = time.perf_counter() - began
        facts: dict[str, Any] = {
            "task": args.task,
            "output": args.output,
            "shape": [1, 3, count, geometry.height, geometry.width],
            "given_frames": 0 if given is None else given.shape[2],
            **options,
            "fps": fps,
            "generate_seconds": elapsed,
            "impl": implementation(device),
            "device": str(device),
        }
    height, width = geometry.height, geometry.width
    text = table(
        {
            "task": args.task,
            "video": f"{count} frames of {height} x {width}, {facts['given_frames']} given",
            "time": f"{elapsed:.2f} s for {facts['steps']} steps on {device} ({facts['impl']})",
            "written": args.output,
        }
    )
    return Outcome(facts, text)


def _sheet(args: argparse.Namespace) -> Outcome:
    check_matplotlib()
    check_output(args.sheet, args.video)
    for name in ("frames", "fps", "goal", "actions", "size"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name}: a sheet shows one clip of each task as it is; leave it out"
            )
    with running(args) as device:
        tokenizer = load_tokenizer(args.tokenizer, device)
        transformer = load_transformer(args.transformer, device)
        geometry = clip_geometry(tokenizer, transformer)
        tasks = _all_tasks(args.given) if args.task == "all" else [_task(args)]
        options = decoding_options(args)
        video = (
            read_clip(args.video, geometry.size, args.start)
            if args.video
            else synthetic_video(geometry)
        )
        results = []
        with progress("generate", len(tasks), "tasks") as advance:
            for result in run_tasks(
                tokenizer, transformer, geometry, tasks, video.to(device), _sheet_class(args, transformer),
                options,
            ):  # fmt: skip
                results.append(result)
                advance(1)
        frames, height, width = geometry.size
        title = (
            f"{args.video or 'rendered scene'}, {frames} frames of {height} x {width}, "
            f"{options['steps']} steps, {options['schedule']}, seed {options['seed']}"
        )
        if not getattr(transformer.config, "prompts", ()):
            title += "; a model without task prompts: it was trained for one task"
        write_task_sheet(args.sheet, results, title)
        facts: dict[str, Any] = {
            "sheet": args.sheet,
            "video": args.video,
            "shape": list(geometry.size),
            "tasks": {
                r.task.name: {
                    "served": r.result is not None,
                    "psnr": r.psnr,
                    "reason": r.reason,
                }
                for r in results
            },
            **options,
            "impl": implementation(device),
            "device": str(device),
        }
    return Outcome(facts, table(task_rows(results) | {"written": args.sheet}))


def _of_size(
    args: argparse.Namespace, tokenizer: VideoTokenizer, transformer: VideoTransformer
) -> VideoTransformer:
    """The transformer, for the grid that --size asks for."""
    if args.size is None:
        return transformer
    if not isinstance(transformer, MaskedTransformer):
        raise ValueError(
            f"--size: expected a MaskedTransformer, this one is a {type(transformer).__name__}"
        )
    (height, width), stride = args.size, tokenizer.config.space_stride
    if height % stride or width % stride:
        raise ValueError(
            f"--size: expected multiples of the tokenizer's {stride}, got {height}x{width}"
        )
    grid = (transformer.config.grid[0], height // stride, width // stride)
    return transformer.with_grid(grid, args.positions)


def _sheet_class(args: argparse.Namespace, transformer: VideoTransformer) -> int:
    """--class-id, else the rendered scene's own class where the model may know it, else the first."""
    if args.class_id is not None:
        return int(args.class_id)
    known = getattr(transformer.config, "num_classes", 0)
    own = args.video is None and known == len(SCENE_CLASSES)
    return scene_class(DEMO_SEED) if own else 0


@contextlib.contextmanager
def _passes_shown(
    transformer: VideoTransformer, options: dict[str, Any], *, known: bool
) -> Iterator[None]:
    """A bar that moves with every pass of the transformer (guidance takes two a step)."""
    steps = options["steps"]
    if isinstance(transformer, AutoregressiveTransformer):
        steps = transformer.config.num_tokens
    total = steps * (2 if options["guidance"] else 1) if known else None
    with progress("generate", total, "passes") as advance:
        hook = transformer.register_forward_hook(lambda *_: advance(1))
        try:
            yield
        finally:
            hook.remove()


def _all_tasks(given: int | None) -> list[Task]:
    """The ten tasks, with another number of given frames for those that predict what follows."""
    return [
        dataclasses.replace(task, first=given)
        if given is not None and isinstance(task, FrameTask) and not task.last
        else task
        for task in TASKS.values()
    ]


def _task(args: argparse.Namespace) -> Task:
    """The task, with as many given frames as the command line says."""
    task = get_task(args.task)
    if args.given is None:
        return task
    if not isinstance(task, FrameTask):
        raise ValueError(f"--given: task {task.name} is not given whole frames; leave it out")
    return dataclasses.replace(task, first=args.given)


def _goal(path: str | None, geometry: ClipGeometry, device: torch.device) -> Tensor | None:
    """[1, 3, H, W]."""
    if path is None:
        return None
    return read_clip(path, (1, geometry.height, geometry.width))[:, :, 0].to(device)


def _actions(args: argparse.Namespace, frames: int, device: torch.device) -> Tensor | None:
    """[1, frames, A]: the rows of the frames from --start on; a last one that lacks is zeros."""
    if args.actions is None:
        return None
    rows = read_action_array(Path(args.actions))[args.start :][:frames]
    if len(rows) < frames - 1:
        raise FileFormatError(
            f"{args.actions}: is too short: {frames - 1} rows from row {args.start} on needed for "
            f"{frames} frames, found {len(rows)}"
        )
    return torch.nn.functional.pad(rows, (0, 0, 0, frames - len(rows))).unsqueeze(0).to(device)


def _given(args: argparse.Namespace, task: Task, geometry: ClipGeometry) -> Tensor | None:
    """The condition [1, 3, T, H, W], as many frames as the task needs; None for tasks without."""
    if not task.has_condition:
        if args.video is not None:
            raise ValueError(f"--video: task {task.name} takes none; leave it out")
        return None
    if args.video is None:
        raise ValueError(f"--video: task {task.name} needs a file to start from; give --video FILE")
    # latent masking shows the true tokens, which a tokenizer that looks ahead makes of the whole clip
    whole = args.condition_mode == "latent"
    frames = geometry.frames if whole else task.min_frames(geometry)
    shape = (frames, geometry.height, geometry.width)
    return read_clip(args.video, shape, args.start)
