"""Between the stages: the frozen tokenizer turns a data set of clips into token shards, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import (
    INDEX,
    TokenClips,
    TokenHeader,
    TokenShardWriter,
    tokenizer_fingerprint,
    write_index,
)
from magvit_fast.errors import MissingExtraError
from magvit_fast.models.magvit_v2 import MagvitV2Tokenizer
from magvit_fast.tasks import ClipGeometry, FrameTask, Task
from magvit_fast.training.config import TransformerTraining
from magvit_fast.training.sources import open_clips


def clip_geometry(tokenizer: MagvitV2Tokenizer, frames: int, size: int) -> ClipGeometry:
    """The geometry of clips [3, frames, size, size] under this tokenizer."""
    grid = tokenizer.config.latent_shape(frames, size, size)
    return ClipGeometry(frames, size, size, grid, causal=True)


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
    config: TransformerTraining,
    tokenizer: MagvitV2Tokenizer,
    task: Task,
    *,
    progress: bool = True,
) -> TokenClips:
    """The token shards of config.tokens.path, written first where there are none.

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
    config: TransformerTraining,
    tokenizer: MagvitV2Tokenizer,
    task: Task,
    fingerprint: str,
    progress: bool,
) -> None:
    from accelerate.utils import gather_object

    source = open_clips(config.data, config.run.seed, quiet=not accelerator.is_main_process)
    draws = [Draw(e, i) for e in range(config.tokens.passes) for i in range(source.num_clips)]
    rank, count = accelerator.process_index, accelerator.num_processes
    mine = draws[len(draws) * rank // count : len(draws) * (rank + 1) // count]
    geometry = clip_geometry(tokenizer, config.data.frames, config.data.size)
    condition = task if condition_differs(task, geometry, tokenizer.config.time_stride) else None
    header = TokenHeader(fingerprint, tokenizer.config.num_bits, geometry.grid, geometry.size)
    tokenizer = tokenizer.to(accelerator.device).eval()
    writer = TokenShardWriter(
        config.tokens.path, header, shard_size=config.tokens.shard_size, name=f"{rank:03d}"
    )
    with writer, _bar(len(mine), progress and accelerator.is_main_process) as bar:
        for batch in _loader(source, mine, config):
            video = batch["video"].to(accelerator.device)
            ids, condition_ids = _encode(accelerator, tokenizer, video, condition, geometry)
            classes = batch["class_id"] if source.class_names else None
            writer.add(ids, condition_ids=condition_ids, class_ids=classes)
            bar.update(len(video))
    shards = gather_object(writer.shards)
    if accelerator.is_main_process:
        write_index(config.tokens.path, header, shards, class_names=source.class_names)
    accelerator.wait_for_everyone()


@torch.inference_mode()
def _encode(
    accelerator: Any,
    tokenizer: MagvitV2Tokenizer,
    video: Tensor,
    task: Task | None,
    geometry: ClipGeometry,
) -> tuple[Tensor, Tensor | None]:
    # Full precision whatever the recipe: a bit near zero must not depend on the training dtype.
    ids = tokenizer.encode(video)
    if task is None:
        return ids, None
    return ids, tokenizer.encode(task.condition_video(video, geometry))


def _loader(source: Any, draws: list[Draw], config: TransformerTraining) -> Any:
    from torch.utils.data import DataLoader

    size = config.tokens.batch_size
    batches = [draws[i : i + size] for i in range(0, len(draws), size)]
    return DataLoader(source, batch_sampler=batches, num_workers=config.run.workers)


def _bar(total: int, shown: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("tqdm", "train", "tokenizing") from error
    return tqdm(total=total, disable=not shown, unit="clip", desc="tokenize", dynamic_ncols=True)
