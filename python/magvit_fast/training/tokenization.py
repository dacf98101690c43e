"""Between the stages: the frozen tokenizer turns a data set of clips into token shards, once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from magvit_fast.data.atomic import check_writable
from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import (
    INDEX,
    TokenClips,
    TokenHeader,
    condition_tensor,
    finished_shard,
    tokenizer_fingerprint,
    write_index,
    write_shard,
)
from magvit_fast.errors import FileFormatError, MissingExtraError
from magvit_fast.models.tokenizers import VideoTokenizer
from magvit_fast.tasks import ClipGeometry, FrameTask, Task
from magvit_fast.training.config import TrainingCondition, TransformerTraining
from magvit_fast.training.maskvit_config import MaskViTTraining
from magvit_fast.training.sources import open_clips


def clip_geometry(tokenizer: VideoTokenizer, frames: int, size: int) -> ClipGeometry:
    """The geometry of clips [3, frames, size, size] under this tokenizer."""
    config = tokenizer.config
    grid = config.latent_shape(frames, size, size)
    ahead = config.causal and not config.streams
    return ClipGeometry(frames, size, size, grid, causal=config.causal, looks_ahead=ahead)


def condition_differs(task: Task, geometry: ClipGeometry) -> bool:
    """Whether condition tokens can differ from the clip's own inside the condition region.

    They cannot when the given frames fill their slots and nothing behind them is seen: leading
    frames, 1 + stride * k of them, under a causal tokenizer (MAGVIT-v2's 5 given frames) whose norms
    do not span the clip.
    """
    if not task.has_condition:
        return False
    blind = geometry.causal and not geometry.looks_ahead
    if isinstance(task, FrameTask) and task.last == 0 and blind:
        return (task.num_first(geometry) - 1) % geometry.time_stride != 0
    return True


def needed_conditions(
    tasks: Sequence[Task], geometry: ClipGeometry, mode: TrainingCondition
) -> dict[str, Task]:
    """The conditions whose tokens training reads, by name, each with a task that has it."""
    if mode == "latent":  # shows the true tokens
        return {}
    wanted = [task for task in tasks if condition_differs(task, geometry)]
    return {task.condition_name(geometry): task for task in reversed(wanted)}


def open_or_write_tokens(
    accelerator: Any,
    config: TransformerTraining | MaskViTTraining,
    tokenizer: VideoTokenizer,
    tasks: Sequence[Task] = (),
    *,
    mode: TrainingCondition = "commit",
    progress: bool = True,
) -> TokenClips:
    """The token shards of config.tokens.path, written first where there are none.

    They hold the tokens of every clip and, for each condition of the tasks, those of its padded clip
    (2 bytes a token): made once by the frozen tokenizer, where the released code makes them anew in
    every step. Processes share the work in contiguous parts, so the set is the same for any number
    of them. Raises FileFormatError for shards of another tokenizer or other tasks, or damaged ones.
    """
    folder = Path(config.tokens.path)
    fingerprint = tokenizer_fingerprint(tokenizer)
    geometry = clip_geometry(tokenizer, config.data.frames, config.data.size)
    conditions = needed_conditions(tasks, geometry, mode)
    if not (folder / INDEX).exists():
        _write(accelerator, config, tokenizer, conditions, fingerprint, progress)
    tokens = TokenClips(folder, fingerprint=fingerprint)
    there = tokens[Draw(0, 0)]
    missing = [
        task.name for name, task in conditions.items() if condition_tensor(name) not in there
    ]
    if missing:
        raise FileFormatError(
            f"{folder}: holds no condition tokens of {', '.join(missing)} (it was written for other "
            "tasks); give another tokens.path, and they will be written there"
        )
    return tokens


def _write(
    accelerator: Any,
    config: TransformerTraining | MaskViTTraining,
    tokenizer: VideoTokenizer,
    conditions: dict[str, Task],
    fingerprint: str,
    progress: bool,
) -> None:
    """This process's shards, then the index. Shards that an interrupted run has left are kept."""
    from accelerate.utils import gather_object

    check_writable(Path(config.tokens.path) / INDEX)
    source = open_clips(config.data, config.run.seed, quiet=not accelerator.is_main_process)
    draws = [Draw(e, i) for e in range(config.tokens.passes) for i in range(source.num_clips)]
    rank, count = accelerator.process_index, accelerator.num_processes
    mine = draws[len(draws) * rank // count : len(draws) * (rank + 1) // count]
    geometry = clip_geometry(tokenizer, config.data.frames, config.data.size)
    header = TokenHeader(fingerprint, tokenizer.config.num_bits, geometry.grid, geometry.size)
    encoder = _Encoder(accelerator, config, tokenizer, conditions, geometry)
    shards = []
    with _bar(len(mine), progress and accelerator.is_main_process) as bar:
        for number, first in enumerate(range(0, len(mine), config.tokens.shard_size)):
            part = mine[first : first + config.tokens.shard_size]
            path = Path(config.tokens.path) / f"tokens-{rank:03d}-{number:05d}.safetensors"
            job = _job(source, part, conditions)
            entry = finished_shard(path, header, job)
            if entry is None:
                entry = write_shard(path, header, job, **encoder(source, part, bar))
            else:
                bar.update(len(part))
            shards.append(entry)
    shards = gather_object(shards)
    if accelerator.is_main_process:
        write_index(config.tokens.path, header, shards, class_names=source.class_names)
    accelerator.wait_for_everyone()


def _job(source: Any, draws: list[Draw], conditions: dict[str, Task]) -> str:
    """What a shard is made from, but for the tokenizer (which the header names)."""
    facts = [source.identity, [(d.epoch, d.index) for d in draws], sorted(conditions)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class _Encoder:
    """Draws of a source -> ids, condition_ids by condition, class_ids and actions where there are any."""

    def __init__(
        self,
        accelerator: Any,
        config: TransformerTraining | MaskViTTraining,
        tokenizer: VideoTokenizer,
        conditions: dict[str, Task],
        geometry: ClipGeometry,
    ) -> None:
        self.device, self.config = accelerator.device, config
        self.tokenizer = tokenizer.to(accelerator.device).eval()
        self.conditions, self.geometry = conditions, geometry

    @torch.inference_mode()
    def __call__(self, source: Any, draws: list[Draw], bar: Any) -> dict[str, Any]:
        size = self.config.tokens.batch_size
        batches = [draws[i : i + size] for i in range(0, len(draws), size)]
        loader = DataLoader(source, batch_sampler=batches, num_workers=self.config.run.workers)
        rows: dict[str, list[Tensor]] = {}
        for batch in loader:
            # Full precision whatever the recipe: a bit near zero must not depend on it.
            video = batch["video"].to(self.device)
            found = {"ids": self.tokenizer.encode(video)}
            for name, task in self.conditions.items():
                padded = task.condition_video(video, self.geometry)
                found[f"condition {name}"] = self.tokenizer.encode(padded)
            if source.class_names:
                found["class_ids"] = batch["class_id"]
            if "actions" in batch:
                found["actions"] = batch["actions"]
            for name, value in found.items():
                rows.setdefault(name, []).append(value.cpu())
            bar.update(len(video))
        whole = {name: torch.cat(values) for name, values in rows.items()}
        conditions = {name: whole.pop(f"condition {name}") for name in self.conditions}
        return {**whole, "condition_ids": conditions}


def _bar(total: int, shown: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "tokenizing") from error
    return tqdm(total=total, disable=not shown, unit="clip", desc="tokenize", dynamic_ncols=True)
