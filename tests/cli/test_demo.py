"""`demo`: its report follows from its files; what the shipped models promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import magvit_fast as mf
from magvit_fast.data.tokens import load_tokens
from magvit_fast.data.video import probe, read_video
from magvit_fast.metrics import psnr
from magvit_fast.models import (
    MagvitV2Tokenizer,
    MaskedTransformer,
)


def test_a_first_generation_demo(
    cli: Callable, first_generation: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    words = ("demo", "--out", tmp_path, *first_generation, "--repeats", "1", "--steps", "2")
    result = cli(*words)
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["frames"], report["given_frames"], report["tokens"]) == (8, 1, 64)
    again = tmp_path / "again.mp4"
    assert cli("detokenize", tmp_path / "tokens.safetensors", "-o", again, *first_generation[:2])
    assert probe(again).frames == 8


DEMO_KEYS = {
    "psnr_reconstruction",
    "psnr_prediction",
    "psnr_copy_last_frame",
    "tokens",
    "bits_per_pixel",
    "codebook_usage",
    "encode_seconds",
    "decode_seconds",
    "generate_seconds",
    "reference_encode_seconds",
    "reference_decode_seconds",
    "impl",
    "device",
}


DEMO_FILES = {
    "input.mp4",
    "reconstruction.mp4",
    "prediction.mp4",
    "sheet.png",
    "tokens.safetensors",
    "report.json",
}


@pytest.mark.parametrize("own_video", [False, True])
def test_demo(cli: Callable, models: Any, clip: str, tmp_path: Path, own_video: bool) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo_out"
    video = ("--video", clip) if own_video else ()
    options = ("--repeats", "1", "--steps", "2")
    result = cli("demo", "--out", out, *models.both, *options, *video, "--json")
    assert result.status == 0, result.err
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(result.out)
    assert {entry.name for entry in out.iterdir()} == DEMO_FILES
    assert set(report) >= DEMO_KEYS
    _check_report(report, out, models)


def _check_report(report: dict[str, Any], out: Path, models: Any) -> None:
    """The report's numbers follow from the files beside it."""
    assert probe(out / "input.mp4").codec == "h264"
    source = read_video(out / "input.mp4").unsqueeze(0)
    assert source.shape == (1, 3, 9, 16, 16)
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        ids = tokenizer.encode(source)
        rebuilt = tokenizer.decode(ids)
    header, tensors = load_tokens(out / "tokens.safetensors")
    assert torch.equal(tensors["ids"], ids)
    assert header.video == (9, 16, 16)
    assert report["tokens"] == ids.numel() == 48
    assert report["bits_per_pixel"] == pytest.approx(48 * 6 / (9 * 16 * 16))
    assert report["codebook_usage"] == pytest.approx(ids.unique().numel() / 64)
    assert report["psnr_reconstruction"] == pytest.approx(psnr(rebuilt, source).item(), abs=1e-3)
    copied = source[:, :, 4:5].expand(-1, -1, 4, -1, -1)
    expected = psnr(copied, source[:, :, 5:]).item()
    assert report["psnr_copy_last_frame"] == pytest.approx(expected, abs=1e-3)
    predicted = mf.generate(
        tokenizer,
        MaskedTransformer.from_pretrained(models.transformer),
        task="frame_prediction",
        video=source[:, :, :5],
        steps=2,
    )
    expected = psnr(predicted[:, :, 5:], source[:, :, 5:]).item()
    assert report["psnr_prediction"] == pytest.approx(expected, abs=1e-3)
    assert probe(out / "prediction.mp4").frames == probe(out / "reconstruction.mp4").frames == 9
    assert all(report[key] > 0 for key in DEMO_KEYS if key.endswith("_seconds"))
    assert (out / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_demo_of_the_shipped_models(cli: Callable, tmp_path: Path) -> None:
    """What `make demo` promises: 26 dB of reconstruction, 1.5 dB over copying the last frame."""
    pytest.importorskip("matplotlib")
    result = cli("demo", "--out", tmp_path, "--repeats", "1", "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert (report["frames"], report["given_frames"]) == (17, 5)
    assert report["psnr_reconstruction"] >= 26.0
    assert report["psnr_prediction"] >= report["psnr_copy_last_frame"] + 1.5
    tokens, again = tmp_path / "tokens.safetensors", tmp_path / "again.mp4"
    assert cli("detokenize", tokens, "-o", again, "--crf", "0").status == 0
    difference = read_video(again) - read_video(tmp_path / "reconstruction.mp4")
    assert difference.abs().mean() < 0.02  # two encodings of the same frames


def test_demo_summary_for_people(cli: Callable, models: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli("demo", "--out", tmp_path, *models.both, "--repeats", "1", "--steps", "2")
    for word in ("reconstruction", "dB over copying", "pure PyTorch", str(tmp_path / "sheet.png")):
        assert word in result.out


def test_demo_bad_video(fails: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = ("demo", "--out", out, *models.both)
    assert "no such file" in fails(*words, "--video", tmp_path / "none.mp4")
    assert "too short: 9 frames" in fails(*words, "--video", clip, "--start", "25")
    assert not out.exists()


def test_demo_into_a_place_that_is_taken(fails: Callable, models: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "out").write_text("a file")
    assert "cannot write" in fails("demo", "--out", tmp_path / "out", *models.both)
