"""The recipes for trying things out, as a user runs them: H.264 files to a masked transformer."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.tiny import write_scene

import magvit_fast as mf
from magvit_fast.data.tokens import TokenClips
from magvit_fast.data.video import read_video
from magvit_fast.models.frame_tokenizer import FrameTokenizer
from magvit_fast.models.magvit_v2 import MagvitV2Tokenizer
from magvit_fast.models.masked_transformer import MaskedTransformer
from magvit_fast.models.maskvit import MaskViTTransformer
from magvit_fast.training import (
    TokenizerTraining,
    TransformerTraining,
    load_recipe,
    load_transformer_recipe,
    train_tokenizer,
    train_transformer,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """Four short H.264 files and a bad one in ./videos."""
    for seed, frames in enumerate((17, 20, 9, 12)):
        write_scene(tmp_path / f"videos/{seed}.mp4", seed, frames, size=48)
    (tmp_path / "videos/bad.mp4").write_bytes(b"not a video")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_videos(recipe: Any) -> Any:
    """The recipe on the files of ./videos in place of rendered scenes."""
    return replace(recipe, data=replace(recipe.data, source="videos", path="videos"))


def test_tiny_recipes_need_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tokenizer(load_recipe(RECIPES / "tiny-tokenizer.toml", TokenizerTraining), progress=False)
    recipe = load_recipe(RECIPES / "tiny-transformer.toml", TransformerTraining)
    assert [h["step"] for h in train_transformer(recipe, progress=False).history] == [1, 2, 3]
    assert TokenClips("runs/tiny-tokens").num_clips == recipe.tokens.passes * recipe.data.scenes


def test_videos_to_tokenizer_to_shards_to_transformer(videos, caplog):
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        recipe = load_recipe(RECIPES / "tiny-tokenizer.toml", TokenizerTraining)
        first = train_tokenizer(on_videos(recipe), progress=False)
        recipe = load_recipe(RECIPES / "tiny-transformer.toml", TransformerTraining)
        second = train_transformer(on_videos(recipe), progress=False)
    assert sum("bad.mp4" in r.getMessage() for r in caplog.records) == 2  # once a stage
    assert [h["step"] for h in first.history] == [1, 2, 3]
    assert all(h["discriminator_r1"] >= 0 and h["adversarial"] > 0 for h in first.history)
    assert [h["step"] for h in second.history] == [1, 2, 3]
    tokenizer = MagvitV2Tokenizer.from_pretrained(first.output)
    transformer = MaskedTransformer.from_pretrained(second.output)
    tokens = TokenClips(videos / "runs/tiny-tokens")
    assert tokens.num_clips == 2 * 4  # passes x videos long enough
    with torch.inference_mode():
        clip = read_video("videos/0.mp4", frames=9, size=32)[None]
        ids = tokenizer.encode(clip)
        assert ids.shape[1:] == tokens.header.grid
        assert tokenizer.decode(ids).shape == clip.shape
        logits = transformer(ids.flatten(1), torch.ones_like(ids.flatten(1), dtype=torch.bool))
    assert torch.isfinite(logits).all()
    assert sorted(p.name for p in (videos / "runs/tiny-tokenizer/checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_maskvit_from_videos_to_predicted_frames(videos):
    recipe = load_recipe(RECIPES / "tiny-maskvit-tokenizer.toml", TokenizerTraining)
    first = train_tokenizer(on_videos(recipe), progress=False)
    recipe = load_transformer_recipe(RECIPES / "tiny-maskvit-transformer.toml")
    second = train_transformer(on_videos(recipe), progress=False)
    assert all(h["discriminator_r1"] >= 0 and h["adversarial"] > 0 for h in first.history)
    assert [h["step"] for h in second.history] == [1, 2]
    tokenizer = FrameTokenizer.from_pretrained(first.output)
    transformer = MaskViTTransformer.from_pretrained(second.output)
    clip = read_video("videos/0.mp4", frames=4, size=16)[None]
    out = mf.generate(tokenizer, transformer, task="frame_prediction", video=clip, steps=3)
    assert out.shape == clip.shape
    # the given frame comes back as the tokenizer has it
    again = tokenizer.decode(tokenizer.encode(clip[:, :, :1]))
    torch.testing.assert_close(out[:, :, :1], again)
