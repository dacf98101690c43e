"""How well a pair of models does one of the ten tasks: the protocol, the samples, the scores."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.cli.classes import class_names
from magvit_fast.cli.clips import check_shape
from magvit_fast.cli.generate import decoding_options
from magvit_fast.cli.measures import load_networks, measure_rows, named_networks
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import Processes, positive_int, table
from magvit_fast.data.actions import read_actions
from magvit_fast.data.clips import cut_window
from magvit_fast.data.index import FileFacts, index_files
from magvit_fast.data.video import read_video
from magvit_fast.decoding import clip_geometry
from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import (
    PROTOCOLS,
    Evaluation,
    Networks,
    Protocol,
    central_crop,
    clip_requests,
    get_protocol,
    resize_bilinear,
)
from magvit_fast.metrics.protocols import ClipRequest
from magvit_fast.models import VideoTransformer
from magvit_fast.models.tokenizers import VideoTokenizer
from magvit_fast.tasks import TASKS, ClipGeometry, FrameTask, Task, get_task

_SEED_STEP = 1_000_003  # between the seeds of two batches: no two share their draws


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quality of generation (in place of reconstruction)",
        "a task on clips of the files, or a published protocol",
    )
    group.add_argument("--task", choices=tuple(TASKS), help="what is generated")
    group.add_argument(
        "--protocol", choices=tuple(PROTOCOLS),
        help="how a published figure is measured: clips, counts, decoding, what is compared",
    )  # fmt: skip
    group.add_argument(
        "--classes", metavar="PATH",
        help="tasks with a class: the transformer's tokens, training folder or a text file, which tell "
        "the order of its classes (default: the folders of the files are all of them)",
    )  # fmt: skip
    group.add_argument("--generated", type=positive_int, metavar="N", help="samples a repeat")
    group.add_argument("--repeats", type=positive_int, help="folds for mean and spread")
    group.add_argument(
        "--batch",
        type=positive_int,
        default=8,
        help="samples made at once (default 8; part of the seed)",
    )


@dataclass(frozen=True)
class _Job:
    """All that a sample depends on but its request."""

    tokenizer: VideoTokenizer
    transformer: VideoTransformer
    geometry: ClipGeometry
    task: Task
    protocol: Protocol
    span: int  # frames read of each real clip
    files: list[Path]
    facts: list[FileFacts]  # of each file
    classes: list[str]
    options: dict[str, Any]
    device: torch.device


def measure_generation(
    files: list[Path],
    tokenizer: VideoTokenizer,
    transformer: VideoTransformer,
    args: argparse.Namespace,
    device: torch.device,
    processes: Processes,
) -> tuple[dict[str, Any], str]:
    """Facts and text. Raises ValueError (protocol, task and models that do not go together)."""
    if args.protocol is not None and args.clips is not None:
        raise ValueError(f"--clips: protocol {args.protocol} says which clips; leave it out")
    clips = _readable(files)
    lengths = [found.frames for found in clips]
    job = _job(files, clips, tokenizer, transformer, args, device)
    protocol = job.protocol
    usable = sum(length >= job.span for length in lengths)
    if not usable:
        raise FileFormatError(
            f"{files[0]}{' and the others' if len(files) > 1 else ''}: too short: a clip takes "
            f"{job.span} frames, found {max(lengths)}; give longer videos"
        )
    if args.protocol is None and args.generated is None:
        protocol = dataclasses.replace(protocol, generated=usable * protocol.windows)
    generated = protocol.generated if args.generated is None else args.generated
    repeats = protocol.repeats if args.repeats is None else args.repeats
    requests = clip_requests(
        dataclasses.replace(protocol, frames=job.span),
        lengths,
        generated=generated,
        repeats=repeats,
        seed=job.options["seed"],
    )
    networks = load_networks(args, device, protocol.frames)
    if not job.task.has_condition and networks == Networks():
        raise ValueError(
            f"--task: {job.task.name} resembles no one clip, only distributions can be compared; "
            "give --fvd-features, --fid-features or --is-features"
        )
    evaluation = Evaluation(networks, folds=repeats, best=protocol.best)
    seen: set[int] = set()
    with progress("generate", generated * repeats, "samples") as advance:
        for number, batch in enumerate(_batches(requests, args.batch)):
            seen |= {r.clip for r in batch}
            if number % processes.count == processes.rank:
                made, real = _samples(job, batch, number)
                evaluation.add(
                    made, real,
                    clips=[r.clip for r in batch], folds=[r.fold for r in batch],
                    first=[r.first for r in batch], paired=job.task.has_condition,
                )  # fmt: skip
            advance(len(batch))
    facts: dict[str, Any] = {
        "protocol": args.protocol,
        "task": job.task.name,
        "shape": [protocol.frames, *_compared_size(job)],
        "samples_per_repeat": generated,
        "repeats": repeats,
        "real_clips": len(seen),
        "files_used": usable,
        "best_trial_counts_for": sorted(protocol.best),
        **job.options,
        **evaluation.results(),
        "networks": named_networks(args),
    }
    facts["differs_from_protocol"] = _differences(args, job, facts)
    return facts, _text(facts)


def _readable(files: list[Path]) -> list[FileFacts]:
    """Raises FileFormatError for the first file that cannot be read."""
    facts = []
    for found in index_files(files):
        if isinstance(found, FileFormatError):
            raise found
        facts.append(found)
    return facts


def _job(
    files: list[Path],
    facts: list[FileFacts],
    tokenizer: VideoTokenizer,
    transformer: VideoTransformer,
    args: argparse.Namespace,
    device: torch.device,
) -> _Job:
    geometry = clip_geometry(tokenizer, transformer)
    check_shape(args.frames, args.size, geometry)
    protocol = _protocol(args, geometry)
    task = _task(args, protocol)
    options = decoding_options(args)
    if args.protocol is not None and args.settings is None:
        settings = {
            "steps": protocol.steps,
            "schedule": protocol.schedule,
            "choice_temperature": protocol.choice_temperature,
            "temperature": 1.0,
            "guidance": 0.0,
        }
        options |= {k: v for k, v in settings.items() if getattr(args, k) is None}
    ahead = isinstance(task, FrameTask) and not task.last
    frames = min(protocol.frames, geometry.frames)
    if options["condition_mode"] == "latent":
        ahead = False  # the tokens of the given slots are those of the true clip
    span = frames if ahead or not task.has_condition else max(frames, geometry.frames)
    classes: list[str] = []
    if task.class_conditional:
        known = getattr(transformer.config, "num_classes", 0)  # MaskViT has none
        classes = class_names(args.classes, files, known)
    elif args.classes is not None:
        raise ValueError(f"--classes: {task.name} has no classes; leave it out")
    protocol = dataclasses.replace(protocol, frames=frames)
    return _Job(
        tokenizer,
        transformer,
        geometry,
        task,
        protocol,
        span,
        files,
        facts,
        classes,
        options,
        device,
    )


def _protocol(args: argparse.Namespace, geometry: ClipGeometry) -> Protocol:
    """The published one, or the plain one: windows of each file, every sample with its clip."""
    if args.protocol is not None:
        return get_protocol(args.protocol)
    return Protocol(
        name="", data="", task=args.task, size=geometry.height, generated=1, repeats=1,
        windows=args.clips or 1, frames=geometry.frames,
    )  # fmt: skip


def _task(args: argparse.Namespace, protocol: Protocol) -> Task:
    if protocol.task is None and args.task is None:
        raise ValueError(f"--task: protocol {protocol.name} needs one of {', '.join(TASKS)}")
    if None not in (protocol.task, args.task) and protocol.task != args.task:
        raise ValueError(
            f"--task: protocol {protocol.name} is for {protocol.task}, got {args.task}"
        )
    task = get_task(args.task or protocol.task or "")
    if protocol.given is not None and isinstance(task, FrameTask):
        return dataclasses.replace(task, first=protocol.given)
    return task


def _batches(requests: Iterator[ClipRequest], size: int) -> Iterator[list[ClipRequest]]:
    while batch := list(itertools.islice(requests, size)):
        yield batch


def _samples(job: _Job, batch: Sequence[ClipRequest], number: int) -> tuple[Tensor, Tensor]:
    """Generated and real clips [B, 3, T, H, W], as they are compared."""
    size = (job.geometry.height, job.geometry.width)
    real = torch.stack(
        [
            cut_window(
                read_video(
                    job.files[r.video],
                    frames=job.span,
                    start=r.start,
                    keyframes=job.facts[r.video].keyframes,
                ),
                size,
                1.0,
                r.place,
            )
            for r in batch
        ]
    ).to(job.device)
    actions = None
    if getattr(job.transformer.config, "action_dim", 0):
        actions = torch.stack([_actions(job, r) for r in batch]).to(job.device)
    made = mf.generate(
        job.tokenizer,
        job.transformer,
        task=job.task,
        video=real if job.task.has_condition else None,
        class_id=[job.classes.index(job.files[r.video].parent.name) for r in batch]
        if job.task.class_conditional
        else None,
        actions=actions,
        frames=job.span,
        **(job.options | {"seed": job.options["seed"] + _SEED_STEP * number}),
    ).float()
    frames = job.protocol.frames
    return _compared(made[:, :, :frames], job), _compared(real[:, :, :frames], job)


def _actions(job: _Job, request: ClipRequest) -> Tensor:
    """[span, A]: the rows of a clip's frames, from the array beside its file."""
    rows = read_actions(job.files[request.video], job.facts[request.video].frames)
    return rows[request.start : request.start + job.span]


def _compared_size(job: _Job) -> tuple[int, int]:
    size = (job.geometry.height, job.geometry.width)
    target = job.protocol.metric_size
    # a model smaller than the protocol's is compared at its own size
    return size if target is None or min(size) <= target else (target, target)


def _compared(video: Tensor, job: _Job) -> Tensor:
    target = _compared_size(job)
    if tuple(video.shape[3:]) == target:
        return video
    side = min(video.shape[3:])
    square = central_crop(video, (side, side))
    return resize_bilinear(square, target, corners="half_pixel").clamp(0, 1)


def _differences(args: argparse.Namespace, job: _Job, facts: Mapping[str, Any]) -> list[str]:
    """Where this run is not the published protocol; empty without one."""
    if args.protocol is None:
        return []
    published, geometry = get_protocol(args.protocol), job.geometry
    asked: dict[str, tuple[object, object]] = {
        "samples a repeat": (published.generated, facts["samples_per_repeat"]),
        "repeats": (published.repeats, facts["repeats"]),
        "frames": (published.frames, job.protocol.frames),
        "pixels": (f"{published.size}x{published.size}", f"{geometry.height}x{geometry.width}"),
        "steps": (published.steps, job.options["steps"]),
        "schedule": (published.schedule, job.options["schedule"]),
        "choice temperature": (published.choice_temperature, job.options["choice_temperature"]),
        "temperature": (1.0, job.options["temperature"]),
        "guidance": (0.0, job.options["guidance"]),
    }
    if published.trials is not None and "trials_per_clip" in facts:
        asked["trials a clip"] = (published.trials, min(facts["trials_per_clip"]))
    return [
        f"{name}: {got} in place of {wanted}"
        for name, (wanted, got) in asked.items()
        if got != wanted
    ]


def _text(facts: dict[str, Any]) -> str:
    frames, height, width = facts["shape"]
    rows: dict[str, object] = {
        "task": facts["task"] + (f", protocol {facts['protocol']}" if facts["protocol"] else ""),
        "samples": f"{facts['samples']} of {frames} x {height} x {width}, from "
        f"{facts['real_clips']} real clips of {facts['files_used']} files",
        "decoding": f"{facts['steps']} steps, {facts['schedule']}, choice temperature "
        f"{facts['choice_temperature']:g}",
        **measure_rows(facts),
    }
    if facts["best_trial_counts_for"]:
        most = facts["trials_per_clip"][1]
        rows["best trial"] = f"of {most} counts for " + ", ".join(facts["best_trial_counts_for"])
    if facts["differs_from_protocol"]:
        rows["not as published"] = "; ".join(facts["differs_from_protocol"])
    return table(rows)
