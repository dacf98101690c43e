"""Stage two: the masked transformer on token shards, with COMMIT's masking (MAGVIT, section 3.2).

One task or several (one a step, for the whole batch), interior or prefix condition; and the
autoregressive baseline on the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magvit_fast.data.tokens import TokenHeader, condition_tensor
from magvit_fast.models.autoregressive_transformer import AutoregressiveTransformer
from magvit_fast.models.masked_transformer import MaskedTransformer
from magvit_fast.models.tokenizers import load_tokenizer
from magvit_fast.tasks import (
    PARTS,
    ClipGeometry,
    CommitBatch,
    CommitLoss,
    FrameTask,
    Task,
    commit_loss,
    commit_mask,
    get_task,
    task_sequence,
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
    """Train (or go on training) a transformer; the result is `config.run.output`/transformer.

    The token shards of `config.tokens.path` are written first if there are none. The log has loss and
    accuracy, the parts of the loss (loss_refine, loss_mask, loss_reconstruct, which add up to it where
    all of them count) and their shares of the positions. With several tasks it also has each of these
    by task ("outpainting_central/loss_mask"), the mean over that task's steps since the last line.
    """
    if isinstance(config, MaskViTTraining):
        return train_maskvit(config, progress=progress)
    accelerator = new_accelerator(config.run)
    tokenizer = load_tokenizer(config.tokenizer)
    tasks = tasks_of(config.task)
    tokens = open_or_write_tokens(
        accelerator, config, tokenizer, tasks, mode=config.task.condition_mode, progress=progress
    )
    causal = tokenizer.config.causal
    del tokenizer
    torch.manual_seed(config.run.seed)
    trainer = TransformerTrainer(
        accelerator, config, tasks, tokens.header, len(tokens.class_names), causal=causal
    )
    return run_trainer(trainer, tokens, progress=progress)


def tasks_of(config: TaskConfig) -> tuple[Task, ...]:
    """The recipe's tasks, with their number of given frames."""
    tasks = [get_task(name) for name in config.all_names]
    if not config.given_frames:
        return tuple(tasks)
    if len(tasks) == 1 and not isinstance(tasks[0], FrameTask):
        raise ValueError(f"task.given_frames: task {tasks[0].name} is not given whole frames")
    return tuple(
        dataclasses.replace(task, first=config.given_frames)
        if isinstance(task, FrameTask) and (task.last == 0 or len(tasks) == 1)
        else task
        for task in tasks
    )


class TransformerTrainer(NetworkTrainer):
    """The network of stage two and what one step does to it."""

    config: TransformerTraining

    def __init__(
        self,
        accelerator: Any,
        config: TransformerTraining,
        tasks: Sequence[Task],
        header: TokenHeader,
        num_classes: int = 0,
        *,
        causal: bool = True,
    ) -> None:
        self.tasks, shape = tuple(tasks), config.model
        check_tokens(config, header, shape.grid, shape.num_bits)
        needing = [task.name for task in tasks if task.class_conditional]
        if needing and num_classes == 0:
            raise ValueError(
                f"data.labels: task {needing[0]} needs classes, but the tokens in "
                f"{config.tokens.path} have no labels"
            )
        if needing and shape.num_classes != num_classes:
            raise ValueError(
                f"model.num_classes: expected {num_classes}, the labels in {config.tokens.path}, "
                f"got {shape.num_classes}"
            )
        self.autoregressive = config.objective == "autoregressive"
        model = (
            AutoregressiveTransformer(shape) if self.autoregressive else MaskedTransformer(shape)
        )
        self.prompt_ids = [model.prompt_id(task.name, task.prompt) for task in tasks]
        self.geometry = ClipGeometry(*header.video, header.grid, causal=causal)
        self.regions = [task.token_mask(self.geometry).flatten() for task in tasks]
        self.prefix = config.task.condition_mode == "prefix"
        if self.prefix:
            self._check_prefix(shape.condition_tokens)
        weights = config.task.weights or (1.0,) * len(tasks)
        self.sequence = task_sequence(weights, config.run.seed)
        super().__init__(accelerator, config, model)

    def forward_backward(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Loss of one part of a batch; its gradients are added to the network's."""
        ids = batch["ids"].flatten(1)
        number = self.sequence[step % len(self.sequence)]
        corrupted, class_id = self._corrupt(batch, ids, step, part)
        prefix = {
            "class_id": class_id,
            "prompt_id": self.prompt_ids[number],
            "condition": self._condition_prefix(batch, ids, number),
        }
        torch.manual_seed(  # dropout's random numbers, so that resuming needs no stored state
            step_seed(self.config.run.seed, step, part, self.accelerator.process_index + 1)
        )
        with self.accelerator.accumulate(self.model):
            if self.autoregressive:
                logits = self.model(ids, **prefix)
            else:
                logits = self.model(corrupted.tokens, corrupted.mask, **prefix)
            options = self.config.task
            result = commit_loss(
                logits,
                corrupted,
                label_smoothing=options.label_smoothing,
                loss_on=PARTS if self.autoregressive else options.loss_on,
            )
            self.accelerator.backward(result.loss)
        values = self._values(result)
        if len(self.tasks) > 1:
            name = self.tasks[number].name
            values |= {f"{name}/{key}": value for key, value in values.items()}
        return values

    def _values(self, result: CommitLoss) -> dict[str, Tensor]:
        # Shares of all positions, so that means over processes are those of the whole batch.
        shares, right = result.fractions, result.accuracies
        values = {
            "loss": result.loss,
            "accuracy": torch.stack([right[name] * shares[name] for name in shares]).sum(),
        }
        if len(result.subtokens) > 1:  # MAGVIT-v2's heads, one a sub-token
            values |= {f"loss_subtoken_{g}": nats for g, nats in enumerate(result.subtokens)}
        if self.autoregressive:
            return values
        return {
            **values,
            **{f"loss_{name}": nats * shares[name] for name, nats in result.parts.items()},
            "share_masked": shares["mask"],
            "share_refined": shares["refine"],
        }

    def _corrupt(
        self, batch: dict[str, Any], ids: Tensor, step: int, part: int
    ) -> tuple[CommitBatch, Tensor | None]:
        """COMMIT's masking, and the class labels with some dropped.

        Random numbers are drawn for the batch of all processes and then cut, so that the number of
        processes does not matter.
        """
        number = self.sequence[step % len(self.sequence)]
        options, task, (count, length) = self.config.task, self.tasks[number], ids.shape
        rank, whole = self.accelerator.process_index, count * self.accelerator.num_processes
        generator = torch.Generator().manual_seed(step_seed(self.config.run.seed, step, part))
        u = torch.rand(whole if options.ratio_per_sample else 1, generator=generator)
        scores = torch.rand(whole, length, generator=generator)
        dropped = torch.rand(whole, generator=generator) < options.class_drop
        mine = slice(rank * count, (rank + 1) * count)
        class_id = None
        if task.class_conditional:
            unconditional = self.config.model.num_classes
            class_id = batch["class_ids"].masked_fill(dropped[mine].to(ids.device), unconditional)
        if self.autoregressive:  # every token is predicted, from those before it
            nothing = torch.zeros_like(ids, dtype=torch.bool)
            unseen = torch.full_like(ids, PARTS.index("mask"))
            return CommitBatch(ids, nothing, ids, unseen), class_id
        condition = region = None
        if task.has_condition and options.condition_mode != "prefix":
            condition = self._condition_ids(batch, ids, number)
            region = self.regions[number].to(ids.device)
        masked = commit_mask(
            ids,
            condition,
            region,
            mode="commit" if options.condition_mode == "prefix" else options.condition_mode,
            u=(u[mine] if options.ratio_per_sample else u).to(ids.device),
            scores=scores[mine].to(ids.device),
        )
        return masked, class_id

    def _condition_ids(self, batch: dict[str, Any], ids: Tensor, number: int) -> Tensor:
        """The condition tokens z~ of a task, [B, N]; those of the clip itself where they are the same
        (the shards then hold no others, see open_or_write_tokens)."""
        name = condition_tensor(self.tasks[number].condition_name(self.geometry))
        return batch[name].flatten(1) if name in batch else ids

    def _condition_prefix(self, batch: dict[str, Any], ids: Tensor, number: int) -> Tensor | None:
        """The tokens of the prefix condition, [B, P]."""
        if not self.prefix or not self.tasks[number].has_condition:
            return None
        region = self.regions[number].to(ids.device)
        return self._condition_ids(batch, ids, number)[:, region]

    def _check_prefix(self, wanted: int) -> None:
        for task, region in zip(self.tasks, self.regions, strict=True):
            if int(region.sum()) != wanted:
                raise ValueError(
                    f"model.condition_tokens: expected {int(region.sum())}, the condition region of "
                    f"task {task.name} in a grid {self.geometry.grid}, got {wanted}"
                )
