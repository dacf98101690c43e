"""Stage two of MaskViT: the window transformer on tokens of whole frames.

Source: MaskViT (arXiv 2206.11894), section 3.3: given frames intact, a random share of the others
masked, cross-entropy on what is masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import TokenClips
from magvit_fast.models.maskvit import MaskViTTransformer
from magvit_fast.models.tokenizers import load_tokenizer
from magvit_fast.tasks import future_loss, given_frames, mask_future
from magvit_fast.training.maskvit_config import MaskViTTraining
from magvit_fast.training.network import NetworkTrainer, check_tokens, run_trainer
from magvit_fast.training.run import TrainingResult, new_accelerator, step_seed
from magvit_fast.training.tokenization import open_or_write_tokens


def train_maskvit(config: MaskViTTraining, *, progress: bool = True) -> TrainingResult:
    """Train (or go on training) a MaskViTTransformer; the result is `config.run.output`/transformer.

    The token shards of `config.tokens.path`, with the actions of the clips where data.actions is
    set, are written first if there are none.
    """
    accelerator = new_accelerator(config.run)
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.config.time_stride != 1:
        raise ValueError(
            "tokenizer: expected one that makes tokens of single frames, got one of "
            f"{tokenizer.config.time_stride} frames a slot in {config.tokenizer}"
        )
    tokens = open_or_write_tokens(accelerator, config, tokenizer, progress=progress)
    del tokenizer
    torch.manual_seed(config.run.seed)
    trainer = MaskViTTrainer(accelerator, config, tokens)
    return run_trainer(trainer, tokens, progress=progress)


class MaskViTTrainer(NetworkTrainer):
    """The network of stage two and what one step does to it."""

    config: MaskViTTraining

    def __init__(self, accelerator: Any, config: MaskViTTraining, tokens: TokenClips) -> None:
        shape = config.model
        check_tokens(config, tokens.header, (config.data.frames, *shape.grid), shape.num_bits)
        _check_actions(config, tokens)
        self.known = given_frames(
            config.data.frames, config.task.given_frames, goal=config.task.goal
        )
        super().__init__(accelerator, config, MaskViTTransformer(shape))

    def forward_backward(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Loss of one part of a batch; its gradients are added to the network's."""
        ids: Tensor = batch["ids"]
        unknown = self._mask(ids, step, part)
        actions = batch["actions"] if self.config.model.action_dim else None
        torch.manual_seed(  # dropout's random numbers, so that resuming needs no stored state
            step_seed(self.config.run.seed, step, part, self.accelerator.process_index + 1)
        )
        with self.accelerator.accumulate(self.model):
            logits = self.model(ids, unknown, actions=actions)
            result = future_loss(logits, ids, unknown)
            self.accelerator.backward(result.loss)
        return {
            "loss": result.loss,
            "accuracy": result.accuracy,
            "share_masked": unknown.float().mean(),
        }

    def _mask(self, ids: Tensor, step: int, part: int) -> Tensor:
        """What is masked at this step.

        Random numbers are drawn for the batch of all processes and then cut, so that the number of
        processes does not matter.
        """
        count, processes = len(ids), self.accelerator.num_processes
        generator = torch.Generator().manual_seed(step_seed(self.config.run.seed, step, part))
        u = torch.rand(count * processes, generator=generator)
        scores = torch.rand(count * processes, *ids.shape[1:], generator=generator)
        mine = slice(
            self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count
        )
        return mask_future(
            ids,
            self.known,
            ratios=self.config.task.mask_ratio,
            u=u[mine].to(ids.device),
            scores=scores[mine].to(ids.device),
        )


def _check_actions(config: MaskViTTraining, tokens: TokenClips) -> None:
    """Raises ValueError where the tokens have no actions or others than the model wants."""
    wanted = config.model.action_dim
    if not wanted:
        return
    actions = tokens[Draw(0, 0)].get("actions")
    found = 0 if actions is None else actions.shape[-1]
    if found != wanted:
        raise ValueError(
            f"model.action_dim: expected {found}, the actions in {config.tokens.path}, got {wanted}"
            if found
            else f"tokens.path: {config.tokens.path} holds tokens without actions, but the model's "
            f"action_dim is {wanted}; tokenize the videos again into another folder"
        )
