"""MaskViT's recipes hold the numbers that are published, and their models fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magvit_fast.models import Discriminator3D, FrameTokenizer, MaskViTTransformer
from magvit_fast.training import (
    MaskViTTraining,
    TokenizerTraining,
    load_recipe,
    load_transformer_recipe,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STAGE_TWO = sorted(p for p in RECIPES.glob("maskvit-*.toml") if "tokenizer" not in p.name)

# frames, given frames, goal, width, numbers of an action
EXPECTED = {
    "maskvit-bair-64": (16, 1, False, 768, 0),
    "maskvit-bair-64-actions": (16, 1, False, 1024, 4),
    "maskvit-bair-64-goal": (16, 1, True, 1024, 0),
    "maskvit-kitti-64": (30, 5, False, 768, 0),
    "maskvit-kitti-256": (30, 5, False, 1024, 0),
    "maskvit-robonet-64": (12, 2, False, 1024, 5),
    "maskvit-robonet-256": (12, 2, False, 1024, 5),
}


def test_all_are_here() -> None:
    assert {p.stem for p in STAGE_TWO} == set(EXPECTED)


@pytest.mark.parametrize("path", STAGE_TWO, ids=lambda p: p.stem)
def test_stage_two(path: Path) -> None:
    recipe = load_transformer_recipe(path)
    assert isinstance(recipe, MaskViTTraining)
    shape, task = recipe.model, recipe.task
    found = (recipe.data.frames, task.given_frames, task.goal, shape.hidden_size, shape.action_dim)
    assert found == EXPECTED[path.stem]
    assert (shape.frames, shape.num_blocks, shape.num_heads) == (recipe.data.frames, 6, 4)
    assert shape.mlp_size == 4 * shape.hidden_size
    assert (task.mask_ratio, shape.dropout, shape.order) == ((0.5, 1.0), 0.0, "sw_stw")
    assert recipe.optimizer.learning_rate == 3e-4
    assert 64 <= recipe.run.batch_size <= 224
    assert 100_000 <= recipe.run.steps <= 300_000
    # stage one of the same data makes its tokens
    stage_one = path.parent / f"{recipe.tokenizer.split('/')[1]}.toml"
    first = load_recipe(stage_one, TokenizerTraining)
    assert f"{first.run.output}/tokenizer" == recipe.tokenizer
    assert first.data.path == recipe.data.path
    size = recipe.data.size
    assert first.model.latent_shape(shape.frames, size, size) == (shape.frames, *shape.grid)
    assert first.model.num_bits == shape.num_bits
    with torch.device("meta"):
        model = MaskViTTransformer(shape)
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    assert matrices == 12 * 12 * shape.hidden_size**2


def test_stage_one() -> None:
    paths = sorted(RECIPES.glob("maskvit-*-tokenizer.toml"))
    assert len(paths) == 5
    for path in paths:
        recipe = load_recipe(path, TokenizerTraining)
        size = recipe.data.size
        with torch.device("meta"):
            model = FrameTokenizer.from_preset(f"maskvit-frame-{size}")
            judge = Discriminator3D(recipe.discriminator)
        assert recipe.model == model.config, path
        assert judge.config.clip == (1, size, size)
        assert judge.config.final_grid == (1, 4, 4)
        assert recipe.perceptual_weights
