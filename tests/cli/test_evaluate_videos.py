"""`evaluate` without networks: reconstruction and prediction of files, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from magvit_fast.cli.clips import copy_last, iter_clips
from magvit_fast.data.video import write_image, write_video
from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import psnr, ssim
from magvit_fast.models import (
    MagvitV2Tokenizer,
)


def test_evaluate_a_folder_of_images(
    cli: Callable, fails: Callable, models: Any, tmp_path: Path
) -> None:
    for i in range(3):
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        write_image(tmp_path / "images" / f"{i}.png", image)
    words = ("evaluate", tmp_path / "images", "--tokenizer", models.tokenizer, "--size", "16")
    result = cli(*words, "--frames", "1", "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [1, 16, 16]
    assert facts["mean"]["clips"] == 3
    assert "or --frames 1 for images" in fails(*words)


def test_evaluate(cli: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    write_video(other, torch.rand(3, 11, 20, 20))
    written = tmp_path / "scores.json"
    result = cli(
        "evaluate", clip, other, *models.both, "--prediction", "--steps", "2", "--json",
        "-o", written,
    )  # fmt: skip
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts == json.loads(written.read_text())
    first, second = facts["files"]
    assert (first["clips"], second["clips"], facts["mean"]["clips"]) == (3, 1, 4)
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        clips = list(iter_clips(clip, (9, 16, 16)))
        rebuilt = [tokenizer.decode(tokenizer.encode(piece)) for piece in clips]
    pairs = list(zip(rebuilt, clips, strict=True))
    assert first["psnr"] == pytest.approx(sum(psnr(a, b).item() for a, b in pairs) / 3, rel=1e-4)
    assert first["ssim"] == pytest.approx(sum(ssim(a, b).item() for a, b in pairs) / 3, rel=1e-3)
    copied = sum(psnr(copy_last(piece, 5), piece[:, :, 5:]).item() for piece in clips) / 3
    assert first["copy_last_frame_psnr"] == pytest.approx(copied, rel=1e-5)
    expected = (3 * first["prediction_psnr"] + second["prediction_psnr"]) / 4
    assert facts["mean"]["prediction_psnr"] == pytest.approx(expected)
    assert first["bits_per_pixel"] == pytest.approx(48 * 6 / (9 * 16 * 16))


def test_evaluate_table(cli: Callable, models: Any, clip: str) -> None:
    result = cli(
        "evaluate", clip, "--tokenizer", models.tokenizer, "--frames", "5", "--size", "16",
        "--clips", "2",
    )  # fmt: skip
    assert result.status == 0, result.err
    head, row, mean, codebook = result.out.splitlines()
    assert head.split() == ["clips", "PSNR", "SSIM", "bits/px", "coded"]
    assert row.split()[:2] == [clip, "2"]
    assert mean.startswith("mean over clips")
    assert "perplexity" in codebook


def test_evaluate_bad_input(fails: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    model = ("--tokenizer", models.tokenizer)
    assert "too short: 61 frames needed, found 30" in fails(
        "evaluate", clip, *model, "--frames", "61"
    )
    assert "1 + 4k" in fails("evaluate", clip, *model, "--frames", "6", "--size", "16")
    assert "no such file" in fails("evaluate", tmp_path / "none.mp4", *model)
    with pytest.raises(FileFormatError, match="too short"):
        list(iter_clips(clip, (31, 8, 8)))


def test_a_first_generation_pair(cli: Callable, first_generation: list[str], clip: str) -> None:
    words = ("evaluate", clip, *first_generation, "--prediction", "--steps", "2", "--json")
    result = cli(*words)
    assert result.status == 0, result.err
    assert json.loads(result.out)["files"][0]["clips"] == 3
