"""Stage two: the masked transformer on token shards, with COMMIT's masking (MAGVIT, section 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from magvit_fast.data.tokens import TokenHeader
from magvit_fast.models.masked_transformer import MaskedTransformer
from magvit_fast.models.tokenizers import load_tokenizer
from magvit_fast.tasks import (
    ClipGeometry,
    CommitBatch,
    FrameTask,
    Task,
    commit_loss,
    commit_mask,
    get_task,
)
from magvit_fast.training.config import TaskConfig, TransformerTraining
from magvit_fast.training.maskvit_config import MaskViTTraining
from magvit_fast.training.maskvit_loop import train_maskvit
from magvit_fast.training.network import NetworkTrainer, check_tokens, run_trainer
from magvit_fast.training.run import TrainingResult, new_accelerator, step_seed
from magvit_fast.training.tokenization import open_or_write_tokens


def train_transformer(
    config: TransformerTraining | MaskViTTraining, *, progress: bool = True
) -> TrainingResult:
    """Train (or go on training) a masked transformer; the result is `config.run.output`/transformer.

    The token shards of `config.tokens.path` are written first if there are none.
    """
    if isinstance(config, MaskViTTraining):
        return train_maskvit(config, progress=progress)
    accelerator = new_accelerator(config.run)
    tokenizer = load_tokenizer(config.tokenizer)
    task = task_of(config.task)
    tokens = open_or_write_tokens(accelerator, config, tokenizer, task, progress=progress)
    causal = tokenizer.config.causal
    del tokenizer
    torch.manual_seed(config.run.seed)
    trainer = TransformerTrainer(
        accelerator, config, task, tokens.header, len(tokens.class_names), causal=causal
    )
    return run_trainer(trainer, tokens, progress=progress)


def task_of(config: TaskConfig) -> Task:
    """The recipe's task, with its number of given frames."""
    task = get_task(config.name)
    if config.given_frames:
        if not isinstance(task, FrameTask):
            raise ValueError(f"task.given_frames: task {task.name} is not given whole frames")
        task = dataclasses.replace(task, first=config.given_frames)
    return task


class TransformerTrainer(NetworkTrainer):
    """The network of stage two and what one step does to it."""

    config: TransformerTraining

    def __init__(
        self,
        accelerator: Any,
        config: TransformerTraining,
        task: Task,
        header: TokenHeader,
        num_classes: int = 0,
        *,
        causal: bool = True,
    ) -> None:
        self.task, shape = task, config.model
        check_tokens(config, header, shape.grid, shape.num_bits)
        if task.class_conditional and shape.num_classes != num_classes:
            raise ValueError(
                f"model.num_classes: expected {num_classes}, the labels in {config.tokens.path}, "
                f"got {shape.num_classes}"
            )
        model = MaskedTransformer(shape)
        self.prompt_id = model.prompt_id(task.name, task.prompt)
        self.geometry = ClipGeometry(*header.video, header.grid, causal=causal)
        super().__init__(accelerator, config, model)

    def forward_backward(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Loss of one part of a batch; its gradients are added to the network's."""
        ids = batch["ids"].flatten(1)
        masked, class_id = self._corrupt(batch, ids, step, part)
        torch.manual_seed(  # dropout's random numbers, so that resuming needs no stored state
            step_seed(self.config.run.seed, step, part, self.accelerator.process_index + 1)
        )
        with self.accelerator.accumulate(self.model):
            logits = self.model(
                masked.tokens, masked.mask, class_id=class_id, prompt_id=self.prompt_id
            )
            result = commit_loss(logits, masked, label_smoothing=self.config.task.label_smoothing)
            self.accelerator.backward(result.loss)
        # Shares of all positions, so that means over processes are those of the whole batch.
        shares, right = result.fractions, result.accuracies
        return {
            "loss": result.loss,
            "accuracy": torch.stack([right[name] * shares[name] for name in shares]).sum(),
            **{f"loss_{name}": nats * shares[name] for name, nats in result.parts.items()},
            "share_masked": shares["mask"],
        }

    def _corrupt(
        self, batch: dict[str, Any], ids: Tensor, step: int, part: int
    ) -> tuple[CommitBatch, Tensor | None]:
        """COMMIT's masking, and the class labels with some dropped.

        Random numbers are drawn for the batch of all processes and then cut, so that the number of
        processes does not matter.
        """
        options, (count, length) = self.config.task, ids.shape
        rank, whole = self.accelerator.process_index, count * self.accelerator.num_processes
        generator = torch.Generator().manual_seed(step_seed(self.config.run.seed, step, part))
        u = torch.rand(whole if options.ratio_per_sample else 1, generator=generator)
        scores = torch.rand(whole, length, generator=generator)
        dropped = torch.rand(whole, generator=generator) < options.class_drop
        mine = slice(rank * count, (rank + 1) * count)
        condition = mask = None
        if self.task.has_condition:
            condition = batch.get("condition_ids", batch["ids"]).flatten(1)
            mask = self.task.token_mask(self.geometry).flatten().to(ids.device)
        masked = commit_mask(
            ids,
            condition,
            mask,
            mode=options.condition_mode,
            u=(u[mine] if options.ratio_per_sample else u).to(ids.device),
            scores=scores[mine].to(ids.device),
        )
        class_id = None
        if self.task.class_conditional:
            unconditional = self.config.model.num_classes
            class_id = batch["class_ids"].masked_fill(dropped[mine].to(ids.device), unconditional)
        return masked, class_id
