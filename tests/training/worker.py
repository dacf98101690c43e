"""What each process of test_distributed.py runs: `python worker.py JOB FOLDER`, or `work` by fork."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training.tiny import SCENES, maskvit_recipe, tokenizer_recipe, transformer_recipe

from magvit_fast.training.config import OptimizerConfig
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.tokenizer_loop import TokenizerTrainer, train_tokenizer
from magvit_fast.training.transformer_loop import train_transformer


def gradients(folder: Path) -> None:
    """Gradients of both networks after one batch of four clips, and that batch's scalars."""
    recipe = tokenizer_recipe(folder)
    recipe = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, lecam=10.0))
    torch.manual_seed(0)
    accelerator = new_accelerator(recipe.run)
    trainer = TokenizerTrainer(accelerator, recipe)
    trainer.lecam.ema_real.fill_(0.5)  # far enough for both halves of LeCam to act
    trainer.lecam.ema_fake.fill_(-0.5)
    video = torch.rand(4, 3, 5, 16, 16)
    mine = video.chunk(accelerator.num_processes)[accelerator.process_index]
    values = trainer.forward_backward({"video": mine}, step=0, part=0)
    means = {k: accelerator.reduce(v.detach(), "mean") for k, v in values.items()}
    if accelerator.is_main_process:
        parameters = trainer.networks.named_parameters()
        tensors = {name.replace("module.", ""): p.grad for name, p in parameters}
        tensors.update({f"value/{k}": v for k, v in means.items()})
        tensors["processes"] = torch.tensor(accelerator.num_processes)
        save_file(tensors, folder / "gradients.safetensors")


def tokenizer(folder: Path) -> None:
    """Every other batch is one of single images."""
    recipe = tokenizer_recipe(
        folder,
        steps=4,
        data=dataclasses.replace(SCENES, image_ratio=0.5),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1),
    )
    write(folder, train_tokenizer(recipe, progress=False).history)


def transformer(folder: Path) -> None:
    """The tokenizer is in folder/tokenizer already."""
    recipe = transformer_recipe(folder, folder / "tokenizer", steps=4)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dropout=0.0))
    write(folder, train_transformer(recipe, progress=False).history)


def maskvit(folder: Path) -> None:
    """Window attention, a mask ratio of its own for every video."""
    recipe = maskvit_recipe(folder, folder / "tokenizer", steps=4)
    write(folder, train_transformer(recipe, progress=False).history)


def multitask(folder: Path) -> None:
    """Three tasks over four steps, with classes and condition tokens of their own."""
    recipe = transformer_recipe(folder, folder / "tokenizer", steps=4, log_every=2)
    model = dataclasses.replace(
        recipe.model, dropout=0.0, prompts=("frame_prediction", "inpainting")
    )
    names = ("frame_prediction", "inpainting_central", "inpainting_dynamic")
    task = dataclasses.replace(recipe.task, names=names)
    write(folder, train_transformer(dataclasses.replace(recipe, model=model, task=task)).history)


def sharded(folder: Path) -> None:
    """`transformer` with its weights sharded as Accelerate's FSDP2 does it (which wants a GPU)."""
    from unittest import mock

    from accelerate import Accelerator

    with mock.patch.object(Accelerator, "prepare", lambda self, *objects: shard(*objects)):
        transformer(folder)


def shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    parameters = dict(model.named_parameters())
    assert any(
        isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters.values()
    )
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameters[name] for name in members]
    return model, optimizer


def write(folder: Path, history: list[dict[str, float]]) -> None:
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        facts = {"history": history, "processes": state.num_processes}
        (folder / "result.json").write_text(json.dumps(facts))


def work(job: str, folder: str) -> None:
    torch.set_num_threads(1)
    jobs = (gradients, tokenizer, transformer, maskvit, multitask, sharded)
    {one.__name__: one for one in jobs}[job](Path(folder))


def work_in_fork(job: str, folder: str) -> None:
    """`work` in a forked process, which must forget that its parent was alone."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    work(job, folder)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
