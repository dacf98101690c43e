"""The MAGVIT release's transformer sequences, in its vocabulary, from our batches.

Our transformer takes prefix rows and masks apart; the release has one sequence of ids:
[task][class][visual tokens] for several tasks, [class][visual tokens] for one, and with the prefix
condition (an ablation) [class][condition tokens][SEP][visual tokens]. Rows of its table: codes,
classes, "unconditional class", special tokens; negative ids count from the end of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magvit_fast.compat.magvit import INPAINTING_PATCHED, SPECIAL_TOKENS
from magvit_fast.models.masked_transformer import MaskedTransformerConfig
from magvit_fast.tasks import GIVEN, PARTS, CommitBatch, Task

MASK = SPECIAL_TOKENS["mask"]
SEPARATOR = SPECIAL_TOKENS["separator"]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the release's embedding table.

    num_special: 16 for several tasks, 1 (MASK alone) for one. With one special row SEP = -2 falls
    on the row of the unconditional class, in the release as here.
    """

    codebook_size: int = 1024
    num_classes: int = 0
    num_special: int = 16

    @classmethod
    def of(cls, config: MaskedTransformerConfig) -> Vocabulary:
        """That of the release's model of this shape: one with prompts has all special rows."""
        return cls(config.subtoken_size, config.num_classes, 16 if config.prompts else 1)

    @property
    def size(self) -> int:
        """UCF-101, class generation alone: 1024 + 101 + 1 + 1 = 1127; BAIR, eight tasks: 1041."""
        return self.codebook_size + self.num_classes + 1 + self.num_special

    @property
    def unconditional_class(self) -> int:
        """Id of "no class"; class c has codebook_size + c."""
        return self.codebook_size + self.num_classes

    def class_tokens(self, batch: int, class_id: Tensor | None) -> Tensor:
        """int64 [B]; None means the unconditional class."""
        if class_id is None:
            return torch.full((batch,), self.unconditional_class)
        if class_id.shape != (batch,):
            raise ValueError(f"class_id: expected [{batch}], got {tuple(class_id.shape)}")
        if class_id.numel() and not 0 <= int(class_id.min()) <= int(class_id.max()) <= (
            self.num_classes
        ):
            raise ValueError(
                f"class_id: expected ids in 0..{self.num_classes}, got {class_id.tolist()}"
            )
        return self.codebook_size + class_id


@dataclass(frozen=True)
class Sequences:
    """What the release's trainer makes of a batch; all [B, L].

    masked_inputs: ids that the network sees. uncond_masked_inputs: the same for the unconditional
    branch of guidance: no class, MASK in place of condition tokens. targets: ids to be predicted.
    weights: float, 0 on the prefix. segment_ids: 1 where a condition token is to be refined.
    """

    masked_inputs: Tensor
    uncond_masked_inputs: Tensor
    targets: Tensor
    weights: Tensor
    segment_ids: Tensor


def task_token(task: Task, *, patched_inpainting: bool = False) -> int:
    """The prompt id of a task: negative, counted from the end of the table.

    The inpainting tasks share the outpainting token unless the release's correction is asked for.

    Raises:
        ValueError: the release has no token for the task.
    """
    if patched_inpainting and task.prompt == "inpainting":
        return INPAINTING_PATCHED
    if task.prompt not in SPECIAL_TOKENS:
        raise ValueError(f"task: the release has no prompt {task.prompt!r}")
    return SPECIAL_TOKENS[task.prompt]


def release_sequences(
    batch: CommitBatch,
    vocabulary: Vocabulary,
    *,
    task: int | None = None,
    unconditional_task: int | None = None,
    class_id: Tensor | None = None,
    prefix: Tensor | None = None,
    reconstruct: bool = True,
) -> Sequences:
    """The sequences of a corrupted batch.

    Args:
        batch: from tasks.commit_mask, in any of its modes.
        vocabulary: its codes must cover the batch's tokens.
        task: a task's token, see `task_token`; None for a single-task model.
        unconditional_task: that of the unconditional branch: FULL_GENERATION where the model knows
            the task, else (None) the task's own.
        class_id: int64 [B] of class-conditional tasks; None = unconditional.
        prefix: condition tokens int64 [B, P] to go between the class and a SEP (prefix condition).
        reconstruct: weight 1 at every predicted position ("mask+refine+recons"); else at selected
            ones alone ("mask+refine").
    """
    count = batch.tokens.shape[0]
    selected = (batch.part == PARTS.index("mask")) | (batch.part == PARTS.index("refine"))
    weights = (batch.part != GIVEN) if reconstruct else selected

    def head(task_id: int | None, classes: Tensor) -> Tensor:
        columns = [] if task_id is None else [torch.full((count, 1), task_id)]
        columns.append(classes.view(count, 1))
        if prefix is not None:
            columns += [prefix, torch.full((count, 1), SEPARATOR)]
        return torch.cat(columns, 1)

    ours = head(task, vocabulary.class_tokens(count, class_id))
    free = head(
        task if unconditional_task is None else unconditional_task,
        vocabulary.class_tokens(count, None),
    )
    nothing = torch.zeros_like(ours)
    return Sequences(
        masked_inputs=torch.cat([ours, batch.tokens.masked_fill(batch.mask, MASK)], 1),
        uncond_masked_inputs=torch.cat([free, batch.targets.masked_fill(selected, MASK)], 1),
        targets=torch.cat([ours, batch.targets], 1),
        weights=torch.cat([nothing, weights.long()], 1).float(),
        segment_ids=torch.cat([nothing, (batch.part == PARTS.index("refine")).long()], 1),
    )
