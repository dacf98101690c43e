"""What both stages share: devices and processes (Accelerate), batches, logs, checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from magvit_fast.data.atomic import check_writable
from magvit_fast.data.order import BatchOrder
from magvit_fast.errors import MagvitFastError, MissingExtraError
from magvit_fast.metrics.gather import PATIENCE
from magvit_fast.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from magvit_fast.training.config import OptimizerConfig, RunConfig
from magvit_fast.training.schedules import warmup_cosine
from magvit_fast.training.sources import batch_loader

log = logging.getLogger("magvit_fast")

# One part of a batch -> its losses and other scalars, gradients accumulated on the way.
StepFunction = Callable[[dict[str, Any], int, int], dict[str, Tensor]]


@dataclass
class TrainingResult:
    """output: folder of the trained model. history: logged scalars, one dict a logged step, each
    with "step" (1 = the first). replaced: clips that stood in for files that could not be decoded."""

    output: Path
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    replaced: int = 0


def new_accelerator(config: RunConfig) -> Any:
    """An Accelerator for the recipe.

    Raises MissingExtraError without the [train] extra, FileWriteError where run.output cannot be
    written: now, and not when the first checkpoint is due.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise MissingExtraError("accelerate", "train", "training") from error
    check_writable(Path(config.output) / "training")
    # Accelerate keeps one precision a process; a second run may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # lets several processes meet over gloo
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=config.output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def step_seed(seed: int, step: int, part: int = 0, rank: int = 0) -> int:
    """A seed of its own for every step, part and process: random numbers need no stored state."""
    return int(np.random.SeedSequence([seed, step, part, rank]).generate_state(1)[0])


class Run:
    """One training run of one stage.

    accelerator: from `new_accelerator`. recipe: the whole recipe, which checkpoints keep.
    """

    def __init__(self, accelerator: Any, recipe: Any) -> None:
        self.accelerator = accelerator
        self.config: RunConfig = recipe.run
        self.optimization: OptimizerConfig = recipe.optimizer
        self.recipe = dataclasses.asdict(recipe)
        self.output = Path(self.config.output)

    def order(self, source: Any, still_ratio: float = 0.0) -> BatchOrder:
        """This process's order of parts of batches."""
        accelerator = self.accelerator
        parts = self.config.gradient_accumulation
        if self.config.batch_size % (parts * accelerator.num_processes):
            raise ValueError(
                "run.batch_size: expected a multiple of gradient_accumulation x processes = "
                f"{parts} x {accelerator.num_processes}, got {self.config.batch_size}"
            )
        return BatchOrder(
            num_clips=source.num_clips,
            num_stills=source.num_stills,
            still_ratio=still_ratio,
            batch_size=self.config.batch_size // parts,
            seed=self.config.seed,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def train(
        self,
        source: Any,
        order: BatchOrder,
        *,
        modules: nn.ModuleDict,
        optimizer: torch.optim.Optimizer,
        forward_backward: StepFunction,
        finish_step: Callable[[], dict[str, Tensor]],
        progress: bool = True,
    ) -> TrainingResult:
        """Run (or go on with) the recipe's steps.

        modules: everything with weights, averages included; what checkpoints hold.
        forward_backward(batch, step, part) handles one part of a batch. finish_step() runs after
        the last part: clip, step, averages.
        """
        result = TrainingResult(self.output, self.config.steps)
        done = self._resume(modules, optimizer)
        labeled = _Labeled()
        with self._bar(done, progress) as bar:
            for step, parts, replaced in self._batches(source, order, done):
                self._set_learning_rate(optimizer, step)
                values = _mean([forward_backward(batch, step, i) for i, batch in enumerate(parts)])
                values.update(finish_step())
                labeled.add(values)
                optimizer.zero_grad()
                result.replaced += replaced
                last = step + 1 == self.config.steps
                if (step + 1) % self.config.log_every == 0 or last:
                    values.update(labeled.take())
                    result.history.append(self._log(step + 1, values, optimizer, bar))
                bar.update()
                if (step + 1) % self.config.checkpoint_every == 0 or last:
                    self._save(step + 1, modules, optimizer)
        if self.config.tensorboard:
            self.accelerator.end_training()
        everywhere = torch.tensor(result.replaced, device=self.accelerator.device)
        result.replaced = int(self.accelerator.reduce(everywhere, reduction="sum"))
        if result.replaced and self.accelerator.is_main_process:
            log.warning("%d clips stood in for files that could not be decoded", result.replaced)
        return result

    def _batches(
        self, source: Any, order: BatchOrder, done: int
    ) -> Iterator[tuple[int, list[dict[str, Any]], int]]:
        """The steps still to do: number, parts of the batch on this process's device, clips in it
        that stand in for undecodable ones (counted here, where it costs no wait for the device)."""
        from accelerate.utils import send_to_device

        parts = self.config.gradient_accumulation
        total = self.config.steps * parts
        loader = iter(batch_loader(source, order, done * parts, total, self.config.workers))
        for step in range(done, self.config.steps):
            batch = [next(loader) for _ in range(parts)]
            replaced = sum(int(part["replaced"].sum()) for part in batch if "replaced" in part)
            yield step, send_to_device(batch, self.accelerator.device, non_blocking=True), replaced

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        options = self.optimization
        factor = warmup_cosine(step, warmup=options.warmup_steps, total=self.config.steps)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor

    def _resume(self, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> int:
        path = latest_checkpoint(self.output / "checkpoints")
        if path is None:
            return 0
        step = load_checkpoint(
            self.accelerator, path, modules=modules, optimizer=optimizer, recipe=self.recipe
        )
        if self.accelerator.is_main_process:
            log.info("continuing from %s", path)
        return step

    def _save(self, step: int, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
        """Only what a run can go on from: the newest checkpoints push out the older ones."""
        states = [modules.state_dict(), *optimizer.state.values()]
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        damaged = torch.stack([_not_finite(v).to(self.accelerator.device) for v in tensors]).any()
        if self.accelerator.reduce(damaged.float(), reduction="sum") > 0:
            raise _diverged(step, "the state of weights or optimizer")
        save_checkpoint(
            self.accelerator,
            self.output / "checkpoints",
            step,
            modules=modules,
            optimizer=optimizer,
            recipe=self.recipe,
            keep=self.config.keep_checkpoints,
        )

    def _log(
        self, step: int, values: dict[str, Tensor], optimizer: torch.optim.Optimizer, bar: Any
    ) -> dict[str, float]:
        """Averages over the processes, to the progress bar and to TensorBoard."""
        stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        means = self.accelerator.reduce(stacked, reduction="mean").tolist()
        scalars = dict(zip(values, means, strict=True))
        # A step that the gradient scaler skipped: infinite gradients are how it finds its scale.
        skipped = self.accelerator.optimizer_step_was_skipped
        bad = [
            name
            for name, value in scalars.items()
            if not (math.isfinite(value) or (skipped and name.endswith("gradient_norm")))
        ]
        if bad:
            raise _diverged(step, ", ".join(bad))
        scalars["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        if self.config.tensorboard:
            if not self.accelerator.trackers:
                self.accelerator.init_trackers("tensorboard")
            self.accelerator.log(scalars, step=step)
        shown = list(scalars.items())[:4]
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown}, refresh=False)
        return {"step": float(step), **scalars}

    def _bar(self, done: int, progress: bool) -> Any:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise MissingExtraError("tqdm", "train", "training") from error
        hidden = not (progress and self.accelerator.is_main_process)
        return tqdm(
            total=self.config.steps, initial=done, disable=hidden, unit="step", dynamic_ncols=True
        )


class _Labeled:
    """Scalars of one task, named task/scalar, which come in that task's steps alone: their means over
    the steps since the last line of the log (a resumed run's first line has the steps since then)."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name in [name for name in values if "/" in name]:
            value = values[name].detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, Tensor]:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


def _diverged(step: int, what: str) -> MagvitFastError:
    return MagvitFastError(
        f"step {step}: {what} is no longer finite; lower optimizer.learning_rate or use "
        "mixed_precision = 'no', and start again in another run.output"
    )


def _not_finite(value: Tensor) -> Tensor:
    """bool scalar; of sharded weights, about this process's share."""
    local: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return ~torch.isfinite(local).all()


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over the parts of a batch; parts need not report the same names (stills skip some)."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.stack([part[name].detach() for part in parts if name in part]).mean()
        for name in names
    }
