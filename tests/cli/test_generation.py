"""generate, demo, evaluate, bench: real runs on tiny models, and their bad input."""

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
from magvit_fast.cli.clips import copy_last, iter_clips
from magvit_fast.data.tokens import load_tokens
from magvit_fast.data.video import probe, read_video, write_image, write_video
from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import psnr, ssim
from magvit_fast.models import (
    AutoregressiveTransformer,
    MagvitConfig,
    MagvitTokenizer,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)

PREDICT = ("generate", "--task", "frame_prediction")


# --- generate -------------------------------------------------------------------------------------


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


def test_a_first_generation_pair(cli: Callable, first_generation: list[str], clip: str) -> None:
    words = ("evaluate", clip, *first_generation, "--prediction", "--steps", "2", "--json")
    result = cli(*words)
    assert result.status == 0, result.err
    assert json.loads(result.out)["files"][0]["clips"] == 3


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


# --- demo -----------------------------------------------------------------------------------------

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


# --- evaluate and bench ---------------------------------------------------------------------------


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


def test_bench(cli: Callable, models: Any) -> None:
    words = ("bench", "--tokenizer", models.tokenizer, "--frames", "5", "--size", "16")
    result = cli(*words, "--repeats", "1", "--json")
    facts = json.loads(result.out)
    assert facts["shape"] == [1, 3, 5, 16, 16]
    for part in ("encode", "decode"):
        ours, reference = facts[f"{part}_seconds"], facts[f"reference_{part}_seconds"]
        assert facts[f"{part}_speedup"] == pytest.approx(reference / ours)
    assert "frames/s" in cli(*words, "--repeats", "1", "--dtype", "bfloat16").out


def test_bench_of_a_first_generation_tokenizer(cli: Callable, first_generation: list[str]) -> None:
    words = ("bench", *first_generation[:2], "--size", "16", "--repeats", "1", "--json")
    result = cli(*words)
    assert result.status == 0, result.err
    assert json.loads(result.out)["shape"] == [1, 3, 16, 16, 16]


def test_bench_bad_input(fails: Callable, models: Any) -> None:
    assert "no preset 'fast'" in fails("bench", "--preset", "fast")
    both = ("--preset", "magvit-v2-demo", "--tokenizer", models.tokenizer)
    assert "got both" in fails("bench", *both)


# --- bench --model --------------------------------------------------------------------------------
class Codec(torch.nn.Module):
    """A model with encode and decode, as third parties have them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = torch.nn.Conv3d(3, width, 3, stride=2, padding=1)
        self.up = torch.nn.ConvTranspose3d(width, 3, 2, stride=2)

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.down(video),)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.up(latent)


def test_bench_of_a_third_party_model(cli: Callable) -> None:
    words = ("bench", "--model", f"{__name__}:Codec", "--frames", "4", "--size", "16")
    sized = (*words, "--repeats", "1", "--config", '{"width": 4}')
    facts = json.loads(cli(*sized, "--json").out)
    assert facts["swapped"] == 1
    assert "transposed" in facts["left"][0]
    assert facts["encode_difference"] < 1e-5
    assert facts["decode_difference"] == 0
    assert facts["encode_seconds"] > 0
    assert facts["patched_decode_peak_bytes"] is None or facts["patched_decode_peak_bytes"] >= 0
    text = cli(*words, "--repeats", "1").out
    assert "left alone: up (ConvTranspose3d)" in text


def test_bench_of_a_model_without_encode(cli: Callable) -> None:
    words = ("bench", "--model", "torch.nn:Conv3d", "--frames", "2", "--size", "8", "--json")
    arguments = '{"in_channels": 3, "out_channels": 4, "kernel_size": 1}'
    facts = json.loads(cli(*words, "--config", arguments).out)
    assert facts["parts"] == ["forward"]


def test_bench_of_a_model_bad_input(fails: Callable) -> None:
    assert "MODULE:CLASS" in fails("bench", "--model", "torch.nn")
    assert "MODULE:CLASS" in fails("bench", "--model", "torch.nn:Nothing")
    assert "'no_such_package'" in fails("bench", "--model", "no_such_package:Model")
    assert "does not take" in fails("bench", "--model", "torch.nn:Conv3d", "--config", "[]")
    assert "torch.nn.Module" in fails("bench", "--model", "builtins:dict")
    assert "--config" in fails("bench", "--config", "{}")
    both = ("--model", "torch.nn:Conv3d", "--preset", "magvit-v2-demo")
    assert "--preset" in fails("bench", *both)
