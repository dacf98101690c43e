"""`generate`: videos and images from tiny models, equal to the library's, and bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import magvit_fast as mf
from magvit_fast.cli import generate as generate_command
from magvit_fast.data.video import probe, read_video, write_video
from magvit_fast.models import (
    AutoregressiveTransformer,
    MagvitConfig,
    MagvitTokenizer,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)

PREDICT = ("generate", "--task", "frame_prediction")


def test_generate_frame_prediction(cli: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    out = tmp_path / "next.mp4"
    options = ("--steps", "3", "--seed", "7", "--start", "4")
    result = cli(*PREDICT, "--video", clip, "-o", out, *models.both, *options, "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [1, 3, 9, 16, 16]
    assert facts["given_frames"] == 5
    assert (facts["steps"], facts["seed"], facts["choice_temperature"]) == (3, 7, 4.5)
    info = probe(out)
    assert (info.frames, info.height, info.width, info.fps) == (9, 16, 16, 12.0)
    expected = mf.generate(
        MagvitV2Tokenizer.from_pretrained(models.tokenizer),
        MaskedTransformer.from_pretrained(models.transformer),
        task="frame_prediction",
        video=read_video(clip, frames=5, size=16, start=4).unsqueeze(0),
        steps=3,
        seed=7,
    )
    write_video(tmp_path / "expected.mp4", expected[0], 12.0)
    assert torch.equal(read_video(out), read_video(tmp_path / "expected.mp4"))


def test_generate_goes_on_for_as_long_as_it_is_told(
    cli: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    out = tmp_path / "long.mp4"
    result = cli(
        *PREDICT, "--video", clip, "-o", out, *models.both, "--steps", "2", "--frames", "20"
    )
    assert result.status == 0, result.err
    assert "20 frames of 16 x 16, 5 given" in result.out
    assert probe(out).frames == 20


def test_generate_from_a_class(cli: Callable, models: Any, tmp_path: Path) -> None:
    out = tmp_path / "class.mp4"
    result = cli(
        "generate", "--task", "class_generation", "-o", out, *models.both, "--steps", "2",
        "--class-id", "1", "--fps", "8",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert (probe(out).frames, probe(out).fps) == (9, 8.0)


def test_generate_with_magvit(cli: Callable, clip: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MagvitTokenizer(
        MagvitConfig(
            filters=4, channel_multipliers=(1, 1, 1), temporal_downsample=(True, True),
            num_res_blocks=1, norm_groups=2, codebook_size=16, embedding_dim=4,
        )
    ).save_pretrained(tmp_path / "tokenizer")  # fmt: skip
    MaskedTransformer(
        MaskedTransformerConfig(
            hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(2, 4, 4),
            num_subtokens=1, subtoken_size=16,
        )
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    out = tmp_path / "out.mp4"
    models = ["--tokenizer", tmp_path / "tokenizer", "--transformer", tmp_path / "transformer"]
    result = cli(
        "generate", "--task", "outpainting_dynamic", "--video", clip, "-o", out, "--steps", "2",
        "--json", *models,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert json.loads(result.out)["shape"] == [1, 3, 8, 16, 16]
    assert out.exists()


def test_generate_as_the_model_was_trained(
    cli: Callable, first_generation: list[str], clip: str, tmp_path: Path
) -> None:
    """--condition-mode reaches the decoder: condition tokens that stay give another video."""
    found = {}
    for mode in ("commit", "fixed"):
        out = tmp_path / f"{mode}.mp4"
        words = ("generate", "--task", "inpainting_central", "--video", clip, "-o", out)
        result = cli(*words, *first_generation, "--steps", "2", "--condition-mode", mode, "--json")
        assert result.status == 0, result.err
        assert json.loads(result.out)["condition_mode"] == mode
        found[mode] = read_video(out)
    assert not torch.equal(found["commit"], found["fixed"])


def test_generate_with_the_baselines_of_magvit(
    cli: Callable, first_generation: list[str], clip: str, tmp_path: Path
) -> None:
    """Frame prediction by latent masking, with the prefix condition, and token after token."""
    shape = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(4, 4, 4), num_subtokens=1,
        subtoken_size=64, condition_tokens=16,
    )  # fmt: skip
    words = ("generate", "--task", "frame_prediction", "--video", clip, "--json", "--steps", "2")
    found = [
        cli(*words, "-o", tmp_path / "latent.mp4", *first_generation, "--condition-mode", "latent")
    ]
    for kind in (MaskedTransformer, AutoregressiveTransformer):
        folder = tmp_path / kind.__name__
        kind(shape).save_pretrained(folder)
        pair = [*first_generation[:2], "--transformer", folder]
        found.append(cli(*words, "-o", tmp_path / f"{kind.__name__}.mp4", *pair))
    for result in found:
        assert result.status == 0, result.err
        assert json.loads(result.out)["shape"] == [1, 3, 8, 16, 16]
    assert json.loads(found[0].out)["given_frames"] == 8


def test_generate_at_another_size(
    cli: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    """The transformer knows 4 x 4 cells of 4 pixels: 12 x 8 is its corner, 20 x 16 interpolated."""
    words = (*PREDICT, "--video", clip, "-o", tmp_path / "x.mp4", *models.both, "--steps", "2")
    assert cli(*words, "--size", "12x8").status == 0
    assert (probe(tmp_path / "x.mp4").height, probe(tmp_path / "x.mp4").width) == (12, 8)
    assert "too few for (3, 5, 4)" in fails(*words, "--size", "20x16")
    assert cli(*words, "--size", "20x16", "--positions", "interpolate").status == 0
    assert probe(tmp_path / "x.mp4").height == 20
    assert "--size: expected multiples of the tokenizer's 4" in fails(*words, "--size", "18x16")


def test_generate_an_image_with_the_published_settings(
    cli: Callable, fails: Callable, models: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = MagvitV2Tokenizer.from_pretrained(models.tokenizer).config
    flat = {"frame_by_frame": True, "temporal_downsample": (False, False)}
    MagvitV2Tokenizer(dataclasses.replace(config, **flat)).save_pretrained(tmp_path / "tokenizer")
    transformer = MaskedTransformer.from_pretrained(models.transformer)
    transformer.with_grid((1, 4, 4)).save_pretrained(tmp_path / "transformer")
    pair = ["--tokenizer", tmp_path / "tokenizer", "--transformer", tmp_path / "transformer"]
    words = ("generate", "--task", "class_generation", "--class-id", "1", "--json")
    named = (*words, "--settings", "magvit-v2-image-256-guided", "--steps", "3")
    result = cli(*named, *pair, "-o", tmp_path / "image.png")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert (facts["steps"], facts["choice_temperature"]) == (3, 15.0)
    assert facts["guidance"] == {"scale": 24.0, "schedule": "cosine_power", "power": 4.0}
    assert read_video(tmp_path / "image.png").shape == (3, 1, 16, 16)
    result = cli(*named, *pair, "--guidance", "2", "-o", tmp_path / "image.png")
    assert json.loads(result.out)["guidance"]["scale"] == 2.0
    line = fails(*words, *models.both, "--steps", "1", "-o", tmp_path / "clip.png")
    assert "a .png holds one image, but the result has 9 frames" in line


def test_generate_bad_input(fails: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x.mp4", *models.both)
    assert "needs a file to start from" in fails(*PREDICT, *out)
    assert "too short: 5 frames" in fails(*PREDICT, *out, "--video", clip, "--start", "26")
    unconditional = ("generate", "--task", "class_generation", *out)
    assert "--video: task class_generation" in fails(*unconditional, "--video", clip)
    assert "schedule" in fails(*PREDICT, *out, "--video", clip, "--schedule", "spiral")
    assert "choice_temperature" in fails(
        *PREDICT, *out, "--video", clip, "--choice-temperature", "-1"
    )
    swapped = ("--tokenizer", models.transformer, "--transformer", models.tokenizer)
    assert "MaskedTransformer" in fails(*PREDICT, "-o", tmp_path / "x", "--video", clip, *swapped)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(fails: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    config = MagvitV2Tokenizer.from_pretrained(models.tokenizer).config
    wide = MagvitV2Tokenizer(type(config)(**{**config.__dict__, "num_bits": 8}))
    wide.save_pretrained(tmp_path / "wide")
    line = fails(
        *PREDICT, "--video", clip, "-o", tmp_path / "x.mp4", "--transformer", models.transformer,
        "--tokenizer", tmp_path / "wide",
    )  # fmt: skip
    assert "6 bits" in line
    assert "8 bits" in line


def test_settings_of_the_model_that_comes_along(
    cli: Callable, models: Any, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shipped settings count for the shipped transformer alone; the command line beats them."""
    (tmp_path / "demo.json").write_text('{"decoding": {"steps": 2, "choice_temperature": 1.5}}')
    (tmp_path / "tokenizer").symlink_to(models.tokenizer)
    (tmp_path / "transformer").symlink_to(models.transformer)
    monkeypatch.setattr("magvit_fast.cli.runtime.DEMO_MODEL", tmp_path)
    monkeypatch.setattr(generate_command, "DEMO_MODEL", tmp_path)
    words = (*PREDICT, "--video", clip, "-o", tmp_path / "x.mp4", "--json")
    facts = json.loads(cli(*words).out)
    assert (facts["steps"], facts["choice_temperature"]) == (2, 1.5)
    facts = json.loads(cli(*words, "--steps", "3").out)
    assert (facts["steps"], facts["choice_temperature"]) == (3, 1.5)
    facts = json.loads(cli(*words, *models.both).out)
    assert (facts["steps"], facts["choice_temperature"]) == (12, 4.5)


def test_missing_shipped_model(
    fails: Callable, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magvit_fast.cli.runtime.DEMO_MODEL", tmp_path)
    line = fails("tokenize", clip, "-o", tmp_path / "t")
    assert "give --tokenizer DIR" in line
