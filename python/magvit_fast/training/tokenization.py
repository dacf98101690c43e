"""Between the stages: the frozen tokenizer turns a data set of clips into token shards, once."""

from __future__ import annotations

import hashlib
import json
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
    finished_shard,
    tokenizer_fingerprint,
    write_index,
    write_shard,
)
from magvit_fast.errors import MissingExtraError
from magvit_fast.models.tokenizers import VideoTokenizer
from magvit_fast.tasks import ClipGeometry, FrameTask, Task
from magvit_fast.training.config import TransformerTraining
from magvit_fast.training.maskvit_config import MaskViTTraining
from magvit_fast.training.sources import open_clips


def clip_geometry(tokenizer: VideoTokenizer, frames: int, size: int) -> ClipGeometry:
    """The geometry of clips [3, frames, size, size] under this tokenizer."""
    grid = tokenizer.config.latent_shape(frames, size, size)
    return ClipGeometry(frames, size, size, grid, causal=tokenizer.config.causal)


def condition_differs(task: Task, geometry: ClipGeometry, time_stride: int) -> bool:
    """Whether condition tokens can differ from the clip's own inside the condition region.

    They cannot when the given frames fill their slots and nothing behind them is seen: leading
    frames, 1 + stride * k of them, under a causal tokenizer (MAGVIT-v2's 5 given frames).
    """
    if not task.has_condition:
        return False
    if isinstance(task, FrameTask) and task.last == 0 and geometry.causal:
        return (task.num_first(geometry) - 1) % time_stride != 0
    return True


def open_or_write_tokens(
    accelerator: Any,
    config: TransformerTraining | MaskViTTraining,
    tokenizer: VideoTokenizer,
    task: Task | None,
    *,
    progress: bool = True,
) -> TokenClips:
    """The token shards of config.tokens.path, written first where there are none.

    task: says whether condition tokens are stored too; None: they are not.

    Processes share the work in contiguous parts, so the set is the same for any number of them.
    Raises FileFormatError for shards of another tokenizer, or damaged ones.
    """
    folder = Path(config.tokens.path)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if not (folder / INDEX).exists():
        _write(accelerator, config, tokenizer, task, fingerprint, progress)
    return TokenClips(folder, fingerprint=fingerprint)


def _write(
    accelerator: Any,
    config: TransformerTraining | MaskViTTraining,
    tokenizer: VideoTokenizer,
    task: Task | None,
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
    stride = tokenizer.config.time_stride
    stored = task is not None and condition_differs(task, geometry, stride)
    condition = task if stored else None
    header = TokenHeader(fingerprint, tokenizer.config.num_bits, geometry.grid, geometry.size)
    encoder = _Encoder(accelerator, config, tokenizer, condition, geometry)
    shards = []
    with _bar(len(mine), progress and accelerator.is_main_process) as bar:
        for number, first in enumerate(range(0, len(mine), config.tokens.shard_size)):
            part = mine[first : first + config.tokens.shard_size]
            path = Path(config.tokens.path) / f"tokens-{rank:03d}-{number:05d}.safetensors"
            job = _job(source, part, condition)
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


def _job(source: Any, draws: list[Draw], condition: Task | None) -> str:
    """What a shard is made from, but for the tokenizer (which the header names)."""
    facts = [source.identity, [(d.epoch, d.index) for d in draws], repr(condition)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class _Encoder:
    """Draws of a source -> ids, condition_ids where they differ, class_ids and actions where there
    are any."""

    def __init__(
        self,
        accelerator: Any,
        config: TransformerTraining | MaskViTTraining,
        tokenizer: VideoTokenizer,
        condition: Task | None,
        geometry: ClipGeometry,
    ) -> None:
        self.device, self.config = accelerator.device, config
        self.tokenizer = tokenizer.to(accelerator.device).eval()
        self.condition, self.geometry = condition, geometry

    @torch.inference_mode()
    def __call__(self, source: Any, draws: list[Draw], bar: Any) -> dict[str, Tensor]:
        size = self.config.tokens.batch_size
        batches = [draws[i : i + size] for i in range(0, len(draws), size)]
        loader = DataLoader(source, batch_sampler=batches, num_workers=self.config.run.workers)
        rows: dict[str, list[Tensor]] = {}
        for batch in loader:
            # Full precision whatever the recipe: a bit near zero must not depend on it.
            video = batch["video"].to(self.device)
            found = {"ids": self.tokenizer.encode(video)}
            if self.condition is not None:
                padded = self.condition.condition_video(video, self.geometry)
                found["condition_ids"] = self.tokenizer.encode(padded)
            if source.class_names:
                found["class_ids"] = batch["class_id"]
            if "actions" in batch:
                found["actions"] = batch["actions"]
            for name, value in found.items():
                rows.setdefault(name, []).append(value.cpu())
            bar.update(len(video))
        return {name: torch.cat(values) for name, values in rows.items()}


def _bar(total: int, shown: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "tokenizing") from error
    return tqdm(total=total, disable=not shown, unit="clip", desc="tokenize", dynamic_ncols=True)
