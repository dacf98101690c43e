"""MAGVIT's B and L as published: the recipes' own networks run and train one step in bfloat16.

Tokenizers see smaller frames than the recipes', and the transformer of the default tests fewer tokens
(the slow tests have all 1,024); nothing else is smaller.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from magvit_fast.data.tokens import TokenHeader
from magvit_fast.training.config import TokenizerTraining, TransformerTraining, load_recipe
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.tokenizer_loop import TokenizerTrainer
from magvit_fast.training.transformer_loop import TransformerTrainer, tasks_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIZES = ["b", pytest.param("l", marks=pytest.mark.slow)]


def here(recipe: Any, folder: Path, **changes: Any) -> Any:
    """The recipe for one process and one small batch."""
    run = dataclasses.replace(
        recipe.run, output=str(folder), batch_size=1, workers=0, tensorboard=False
    )
    assert run.mixed_precision == "bf16"
    return dataclasses.replace(recipe, run=run, **changes)


def step(trainer: Any, batch: dict[str, torch.Tensor], network: nn.Module) -> dict[str, float]:
    """One whole step past the warm-up; every parameter with a gradient moves."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-4
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    batch = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
    values = trainer.forward_backward(batch, 0, 0)
    values.update(trainer.finish_step())
    assert all(p.dtype == torch.float32 for p in network.parameters())
    moved = [n for n, p in network.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.95 * len(before), set(before) - set(moved)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    return {name: float(value.detach()) for name, value in values.items()}


@pytest.mark.parametrize(
    ("size", "kind", "side"),
    [
        ("b", "multitask", 8),
        pytest.param("b", "frame-prediction", 16, marks=pytest.mark.slow),
        pytest.param("b", "autoregressive", 16, marks=pytest.mark.slow),
        pytest.param("l", "multitask", 16, marks=pytest.mark.slow),
    ],
)
def test_transformers(tmp_path: Path, size: str, kind: str, side: int) -> None:
    recipe = load_recipe(RECIPES / f"magvit-{size}-bair-{kind}.toml", TransformerTraining)
    grid = (4, side, side)
    recipe = here(recipe, tmp_path, model=dataclasses.replace(recipe.model, grid=grid))
    header = TokenHeader("", 10, grid, (16, 64, 64))
    torch.manual_seed(0)
    trainer = TransformerTrainer(
        new_accelerator(recipe.run), recipe, tasks_of(recipe.task), header, causal=False
    )
    ids = torch.randint(0, 1024, (1, *grid))
    values = step(trainer, {"ids": ids}, trainer.model)
    assert values["loss"] == pytest.approx(math.log(1024), abs=0.5)
    assert values["gradient_norm"] > 0
    dtypes = [
        module.weight.dtype for module in trainer.model.modules() if hasattr(module, "weight")
    ]
    assert set(dtypes) == {torch.float32}
    expected = {"b": 87.3, "l": 305.6}[size]
    assert round(sum(p.numel() for p in trainer.model.parameters()) / 1e6) == pytest.approx(
        expected, abs=1.0
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("data", ["ucf101", pytest.param("bair", marks=pytest.mark.slow)])
def test_tokenizers_with_their_discriminators(tmp_path: Path, size: str, data: str) -> None:
    recipe = load_recipe(RECIPES / f"magvit-{size}-{data}-tokenizer.toml", TokenizerTraining)
    recipe = here(
        recipe, tmp_path, perceptual_weights="", init_from="", init_discriminator_from="",
        data=dataclasses.replace(recipe.data, size=16),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = TokenizerTrainer(new_accelerator(recipe.run), recipe)
    video = torch.rand(1, 3, 16, 16, 16)
    values = step(trainer, {"video": video}, trainer.networks)
    for name in ("reconstruction", "adversarial", "quantizer", "discriminator_r1"):
        assert math.isfinite(values[name]), name
    stride = 8 if data == "ucf101" else 4
    with trainer.accelerator.autocast(), torch.no_grad():
        ids = trainer.tokenizer.eval().encode(video.to(trainer.accelerator.device))
    assert ids.shape == (1, 4, 16 // stride, 16 // stride)
    assert int(ids.max()) < 1024
