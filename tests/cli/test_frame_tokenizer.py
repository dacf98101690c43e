"""Every command on a frame-by-frame tokenizer, and MaskViT's pair under evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import magvit_fast as mf
from magvit_fast.data.synthetic import render_clip
from magvit_fast.data.tokens import load_tokens
from magvit_fast.data.video import probe, read_video, write_video
from magvit_fast.metrics import get_protocol, psnr
from magvit_fast.models import (
    FrameTokenizer,
    load_transformer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of 9 frames, actions beside them."""
    root = tmp_path_factory.mktemp("recorded")
    for number in range(2):
        pixels = torch.from_numpy(render_clip(number, 9, 16))
        write_video(root / f"{number}.mp4", pixels.permute(3, 0, 1, 2), 12.0)
        rows = np.random.default_rng(number).normal(size=(8, 2)).astype(np.float32)
        np.save(root / f"{number}.npy", rows)
    return root


@pytest.mark.parametrize("frames", [1, 17])
def test_tokens_there_and_back(
    cli: Callable, maskvit_pair: list[str], clip: str, tmp_path: Path, frames: int
) -> None:
    tokens, video = tmp_path / "t.safetensors", tmp_path / "v.mp4"
    result = cli("tokenize", clip, "-o", tokens, *maskvit_pair[:2], "--frames", str(frames))
    assert result.status == 0, result.err
    header, tensors = load_tokens(tokens)
    assert header.video == (frames, 24, 32)
    tokenizer = FrameTokenizer.from_pretrained(maskvit_pair[1])
    with torch.inference_mode():
        expected = tokenizer.encode(read_video(clip, frames=frames).unsqueeze(0))
    assert torch.equal(tensors["ids"], expected)
    assert cli("detokenize", tokens, "-o", video, *maskvit_pair[:2]).status == 0
    assert probe(video).frames == frames


def test_bench_and_reconstruction(cli: Callable, maskvit_pair: list[str], clip: str) -> None:
    words = ("bench", *maskvit_pair[:2], "--size", "16", "--repeats", "1", "--json")
    result = cli(*words)
    assert result.status == 0, result.err
    assert json.loads(result.out)["encode_seconds"] > 0
    words = ("evaluate", clip, *maskvit_pair[:2], "--size", "16", "--frames", "6", "--json")
    result = cli(*words)
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["mean"]["clips"] == 5
    assert facts["mean"]["bits_per_pixel"] == pytest.approx(4 / 16)


def test_prediction_under_its_protocol_with_the_recorded_actions(
    cli: Callable, maskvit_pair: list[str], folder: Path
) -> None:
    words = (
        "evaluate",
        folder,
        *maskvit_pair,
        "--protocol",
        "bair-maskvit",
        "--steps",
        "2",
        "--json",
    )
    result = cli(*words, "--generated", "4", "--batch", "4")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [6, 16, 16]
    assert (facts["samples"], facts["real_clips"]) == (4, 2)
    assert facts["best_trial_counts_for"] == ["lpips", "psnr", "ssim"]
    order = np.random.default_rng(0).permutation(2).tolist() * 2
    real = torch.stack([read_video(folder / f"{n}.mp4", frames=6, size=16) for n in order])
    actions = torch.stack([torch.from_numpy(np.load(folder / f"{n}.npy"))[:6] for n in order])
    made = mf.generate(
        FrameTokenizer.from_pretrained(maskvit_pair[1]), load_transformer(maskvit_pair[3]),
        task="frame_prediction", video=real, actions=actions, steps=2,
    )  # fmt: skip
    values = psnr(made, real).view(2, 2).amax(0)  # the same two clips twice
    assert facts["psnr"] == pytest.approx(float(values.mean()), rel=1e-4)


def test_protocols_of_fewer_frames_take_as_many_actions(
    cli: Callable, maskvit_pair: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows may then end nearer to the end of a file than the model's clips would."""
    short = dataclasses.replace(get_protocol("bair-maskvit"), frames=4, windows=6)
    monkeypatch.setattr("magvit_fast.cli.generation_quality.get_protocol", lambda name: short)
    words = ("evaluate", folder, *maskvit_pair, "--protocol", "bair-maskvit", "--steps", "2")
    result = cli(*words, "--generated", "12", "--batch", "12", "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [4, 16, 16]
    assert facts["real_clips"] == 12


def test_missing_actions(fails: Callable, maskvit_pair: list[str], clip: str) -> None:
    line = fails("evaluate", clip, *maskvit_pair, "--task", "frame_prediction")
    assert "has no actions beside it" in line


def test_a_sheet_says_what_is_not_served(
    cli: Callable, maskvit_pair: list[str], clip: str, tmp_path: Path
) -> None:
    """Region tasks are none of MaskViT's, and without --actions its predictions are not either."""
    pytest.importorskip("matplotlib")
    words = (
        "generate",
        "--task",
        "all",
        "--sheet",
        tmp_path / "sheet.png",
        *maskvit_pair,
        "--json",
    )
    result = cli(*words, "--video", clip, "--steps", "2")
    assert result.status == 0, result.err
    tasks = json.loads(result.out)["tasks"]
    assert not any(task["served"] for task in tasks.values())
    assert "knows given frames alone" in tasks["inpainting_central"]["reason"]
    assert tasks["frame_prediction"]["reason"].startswith("actions: the transformer needs")
