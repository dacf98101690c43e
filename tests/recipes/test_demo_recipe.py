"""The recipe of the demo's models: its parts do what they say, and a tiny run goes through."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from magvit_fast.models import MagvitV2Tokenizer, MaskedTransformer

FOLDER = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def recipe_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_recipe", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _tiny_tokenizer() -> MagvitV2Tokenizer:
    torch.manual_seed(0)
    changes = {"filters": 4, "channel_multipliers": (1, 1, 2, 2)}
    return MagvitV2Tokenizer.from_preset("magvit-v2-demo", **changes).eval()


@torch.no_grad()
def test_inflation_keeps_images_and_treats_video_frame_by_frame(recipe_module: ModuleType) -> None:
    model = _tiny_tokenizer()
    images = torch.rand(5, 3, 1, 16, 16)
    before = model(images).reconstruction
    recipe_module.inflate(model)
    torch.testing.assert_close(model(images).reconstruction, before, atol=1e-4, rtol=1e-4)
    # A clip's slot s is now the image of its frame 4s, shown for the four frames up to it.
    video = images.squeeze(2).transpose(0, 1).unsqueeze(0)
    rebuilt = model(video).reconstruction[0].transpose(0, 1)
    expected = before[:, :, 0][[0, 4, 4, 4, 4]]
    torch.testing.assert_close(rebuilt, expected, atol=1e-4, rtol=1e-4)


def test_soft_bits_end_as_the_quantizer_s(recipe_module: ModuleType) -> None:
    model, video = _tiny_tokenizer(), torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        hard, loss = recipe_module.tokenizer_step(model, video, 10, 10)
        soft, _ = recipe_module.tokenizer_step(model, video, 0, 10)
        nearly, commitment = recipe_module.tokenizer_step(model, video, 10**9 - 1, 10**9)
    torch.testing.assert_close(nearly, hard)
    assert not torch.allclose(soft, hard)
    torch.testing.assert_close(hard, model(video).reconstruction)
    torch.testing.assert_close(loss, model(video).losses["quantizer"])
    torch.testing.assert_close(commitment, model(video).losses["commitment"])


def test_crops_have_the_stage_s_shape_and_are_new(recipe_module: ModuleType) -> None:
    stage = recipe_module.Stage(frames=5, size=32, batch_size=3, steps=1)
    batches = recipe_module.crops(stage, iter(range(100)), 0)
    first, second = next(batches), next(batches)
    assert first.shape == (3, 3, 5, 32, 32)
    assert not torch.equal(first, second)


def test_a_tiny_run_makes_both_models_and_their_scores(
    recipe_module: ModuleType, tmp_path: Path
) -> None:
    recipe = recipe_module.Recipe.read(FOLDER / "demo.toml")
    stage = recipe.tokenizer.stages[0]
    stages = tuple(
        dataclasses.replace(stage, frames=frames, size=16, batch_size=1, steps=2, decoder_only=last)
        for frames, last in ((1, False), (5, False), (5, True))
    )
    tiny = dataclasses.replace(
        recipe,
        precision="no",
        tokenizer=dataclasses.replace(recipe.tokenizer, stages=stages, soft_steps=3),
        tokens={"clips": 3, "batch_size": 2},
        transformer=dataclasses.replace(recipe.transformer, steps=2, batch_size=2),
        polish=dataclasses.replace(recipe.polish, steps=2),
        decoding={**recipe.decoding, "steps": 2},
        evaluation={"clips": 1, "crf": 12.0},
    )
    scores = recipe_module.run(tiny, tmp_path)
    assert scores["gain_over_copying"] == pytest.approx(
        scores["psnr_prediction"] - scores["psnr_copy_last_frame"], abs=0.02
    )
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert facts["held_out"]["clips"] == 1
    tokenizer = MagvitV2Tokenizer.from_pretrained(tmp_path / "tokenizer")
    MaskedTransformer.from_pretrained(tmp_path / "transformer")
    # Run again, it finds everything done and comes to the same scores.
    stamp = (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime_ns
    again = recipe_module.run(tiny, tmp_path)
    assert again == pytest.approx(scores, abs=0.1)  # the H.264 encoder's threads vary a little
    assert (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime_ns == stamp
    assert tokenizer.config.num_bits == 16
