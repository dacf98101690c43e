"""The recipe that plans with a trained MaskViT pair: its world, its models' fit, a run of all of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from magvit_fast import planning
from magvit_fast.decoding import clip_geometry
from magvit_fast.models import FrameTokenizer, MaskViTTransformer
from magvit_fast.training import MaskViTTraining, TokenizerTraining, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "plan_block"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_block_recipe", FOLDER / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_two_stages_fit_each_other() -> None:
    first = load_recipe(FOLDER / "tokenizer.toml", TokenizerTraining)
    second = load_recipe(FOLDER / "transformer.toml", MaskViTTraining)
    assert first.data.path == second.data.path
    assert second.tokenizer == f"{first.run.output}/tokenizer"
    with torch.device("meta"):
        geometry = clip_geometry(FrameTokenizer(first.model), MaskViTTransformer(second.model))
    assert geometry.size == (6, 32, 32)
    assert second.model.action_dim == 2


def test_the_block_is_drawn_where_it_is(recipe: ModuleType) -> None:
    frame = recipe.render(torch.tensor([4.5, 10.0]))
    assert frame.shape == (3, 32, 32)
    share = (frame[0] - recipe.GROUND[0]) / (recipe.COLOR[0] - recipe.GROUND[0])
    assert float(share.sum()) == pytest.approx(64.0, rel=1e-5)
    torch.testing.assert_close(share[12, 3:14], torch.tensor([0, 0.5, *[1.0] * 7, 0.5, 0]))
    assert float(share[9].sum()) == 0.0
    assert float(share[10].sum()) == pytest.approx(8.0)


def test_planning_on_the_true_rules_reaches_the_goals(recipe: ModuleType) -> None:
    ours, random = [], []
    for seed, (start, goal) in enumerate(recipe.pairs(3)):
        world = recipe.BlockWorld(start)
        cost = planning.PixelCost(recipe.render(goal))
        ours.append(recipe.final_distance(recipe.TrueModel(world), cost, world, goal, 10, seed))
        random.append(recipe.random_distance(start, goal, 10, seed))
    assert np.mean(ours) < 2.5  # pixels
    assert np.mean(ours) < np.mean(random) / 4


@pytest.mark.slow
def test_all_of_it_at_a_small_scale(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    arguments = ["--clips", "16", "--episodes", "1", "--steps", "1", "--scale", "0.003"]
    monkeypatch.setattr(sys, "argv", ["plan.py", "--output", str(tmp_path / "out"), *arguments])
    recipe.main()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["final_distance_pixels"]) == 6
    assert len(report["psnr"]) == 4
    clips = sorted((tmp_path / "out" / "clips").glob("*.npy"))
    assert len(clips) == 16
    assert np.abs(np.load(clips[0])).max() <= 1.0
