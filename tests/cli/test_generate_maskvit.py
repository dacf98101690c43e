"""generate with a MaskViT pair: given frames, a goal, actions, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import magvit_fast as mf
from magvit_fast.data.video import probe, read_video, write_video
from magvit_fast.models import (
    FrameTokenizer,
    load_transformer,
)
from magvit_fast.tasks import TASKS

PREDICT = ("generate", "--task", "frame_prediction", "--steps", "3")


@pytest.fixture(scope="module")
def actions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("actions") / "clip.npy"
    np.save(path, np.random.default_rng(0).normal(size=(29, 2)).astype(np.float32))
    return str(path)


def test_given_frames_goal_and_actions(
    cli: Callable, maskvit_pair: list[str], actions: str, clip: str, tmp_path: Path
) -> None:
    out = tmp_path / "next.mp4"
    result = cli(
        *PREDICT, "--video", clip, "--start", "3", "--given", "2", "--goal", clip, "--actions",
        actions, "-o", out, *maskvit_pair, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [1, 3, 6, 16, 16]
    assert facts["given_frames"] == 2
    expected = mf.generate(
        FrameTokenizer.from_pretrained(maskvit_pair[1]),
        load_transformer(maskvit_pair[3]),
        task=dataclasses.replace(TASKS["frame_prediction"], first=2),
        video=read_video(clip, frames=2, size=16, start=3).unsqueeze(0),
        goal=read_video(clip, frames=1, size=16)[:, 0].unsqueeze(0),
        actions=torch.from_numpy(np.load(actions))[None, 3:9],
        steps=3,
    )
    write_video(tmp_path / "expected.mp4", expected[0], 12.0)
    assert torch.equal(read_video(out), read_video(tmp_path / "expected.mp4"))


def test_long_video(
    cli: Callable, maskvit_pair: list[str], actions: str, clip: str, tmp_path: Path
) -> None:
    out = tmp_path / "long.mp4"
    options = ("--video", clip, "--actions", actions, "--frames", "30", "-o", out)
    result = cli(*PREDICT, *options, *maskvit_pair)
    assert result.status == 0, result.err
    assert "30 frames of 16 x 16, 1 given" in result.out
    assert probe(out).frames == 30


def test_bad_input(
    fails: Callable, maskvit_pair: list[str], actions: str, clip: str, models: Any, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "x.mp4")
    basic = (*PREDICT, "--video", clip, *out)
    with_actions = (*basic, *maskvit_pair, "--actions", actions)
    assert "actions: the transformer needs [1, 6, 2]" in fails(*basic, *maskvit_pair)
    assert "is too short: 5 rows from row 27 on" in fails(*with_actions, "--start", "27")
    missing = fails(*basic, *maskvit_pair, "--actions", tmp_path / "none.npy")
    assert "none.npy: cannot be read as a NumPy array" in missing
    assert "guidance: expected 0, MaskViT" in fails(*with_actions, "--guidance", "2")
    assert "only a MaskViTTransformer takes them" in fails(*basic, *models.both, "--goal", clip)
    assert "--given: task outpainting_central is not given whole frames" in fails(
        "generate",
        "--task",
        "outpainting_central",
        "--given",
        "2",
        "--video",
        clip,
        *out,
        *maskvit_pair,
    )
    joined = fails(*basic, "--tokenizer", models.tokenizer, "--transformer", maskvit_pair[3])
    assert "its 16 codes are 4 bits, but the tokenizer's ids have 6 bits" in joined
    assert "holds a FrameTokenizer, expected a MaskedTransformer or" in fails(
        *basic, "--tokenizer", maskvit_pair[1], "--transformer", maskvit_pair[1]
    )
    assert not (tmp_path / "x.mp4").exists()
