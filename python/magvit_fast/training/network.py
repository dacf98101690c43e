"""What the trainers of stage two share: one network, its optimizer, and the way from tokens to a
stored model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magvit_fast.data.tokens import TokenClips, TokenHeader
from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.training.checkpoints import whole_state
from magvit_fast.training.run import Run, TrainingResult


class NetworkTrainer(ABC):
    """A network of stage two and what one step does to it.

    config: the recipe, with [run], [optimizer] and [model]. model: freshly initialized.
    """

    def __init__(self, accelerator: Any, config: Any, model: PretrainedMixin) -> None:
        self.accelerator, self.config = accelerator, config
        self.kind = type(model)
        optimizer = torch.optim.AdamW(
            weight_decay_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.modules = nn.ModuleDict({"transformer": self.model})

    @abstractmethod
    def forward_backward(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Loss of one part of a batch; its gradients are added to the network's."""

    def finish_step(self) -> dict[str, Tensor]:
        """Clip and step."""
        values: dict[str, Tensor] = {}
        if self.config.optimizer.clip_norm > 0:
            norm = self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.clip_norm
            )
            gather = getattr(norm, "full_tensor", None)  # FSDP2 keeps shards
            values["gradient_norm"] = gather() if gather else norm
        self.optimizer.step()
        return values

    def save(self, folder: Path) -> None:
        """Write the model as config.json + model.safetensors. Called by every process."""
        state = whole_state(self.model)
        if self.accelerator.is_main_process:
            model = self.kind(self.config.model)
            model.load_state_dict(state)
            model.save_pretrained(folder)
        self.accelerator.wait_for_everyone()


def check_tokens(config: Any, header: TokenHeader, grid: tuple[int, int, int], bits: int) -> None:
    """Raises ValueError where the recipe's model, of this grid and bits, is not for these tokens."""
    if (grid, bits) != (header.grid, header.num_bits):
        raise ValueError(
            f"model: expected grid {header.grid} and {header.num_bits} bits, those of the "
            f"tokens in {config.tokens.path}, got grid {grid} and {bits} bits"
        )


def run_trainer(
    trainer: NetworkTrainer, tokens: TokenClips, *, progress: bool = True
) -> TrainingResult:
    """Train (or go on) on these tokens; the result is the folder `run.output`/transformer."""
    run = Run(trainer.accelerator, trainer.config)
    result = run.train(
        tokens,
        run.order(tokens),
        modules=trainer.modules,
        optimizer=trainer.optimizer,
        forward_backward=trainer.forward_backward,
        finish_step=trainer.finish_step,
        progress=progress,
    )
    result.output = Path(trainer.config.run.output) / "transformer"
    trainer.save(result.output)
    return result


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: decay for matrices of linear layers, not for biases, norms, embeddings."""
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = list(model.parameters())
    return [
        {
            "params": [p for p in parameters if id(p) in kernels],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in parameters if id(p) not in kernels], "weight_decay": 0.0},
    ]
