"""tokenize and detokenize: streaming, the tail, bad files, full disks, interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from magvit_fast.data.tokens import TokenHeader, load_tokens, save_tokens
from magvit_fast.data.video import probe, read_video, write_video
from magvit_fast.models import MagvitTokenizer, MagvitV2Tokenizer


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 30])
def test_round_trip_of_any_length(
    cli: Callable, models: Any, clip: str, tmp_path: Path, frames: int
) -> None:
    tokens, video = tmp_path / "clip.safetensors", tmp_path / "again.mp4"
    model = ("--tokenizer", models.tokenizer)
    result = cli("tokenize", clip, "-o", tokens, *model, "--frames", str(frames), "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    slots = 1 + -(-(frames - 1) // 4)
    assert facts["frames"] == frames
    assert facts["grid"] == [slots, 6, 8]
    assert facts["tokens"] == slots * 48
    assert facts["bits_per_pixel"] == pytest.approx(slots * 48 * 6 / (frames * 24 * 32))

    result = cli("detokenize", tokens, "-o", video, *model, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["frames"] == frames
    info = probe(video)
    assert (info.frames, info.fps, info.height, info.width) == (frames, 12.0, 24, 32)


def test_streaming_equals_the_whole_and_the_tail_repeats_the_last_frame(
    done: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.safetensors"
    done("tokenize", clip, "-o", path, "--tokenizer", models.tokenizer)
    header, tensors = load_tokens(path)
    frames = read_video(clip)
    padded = torch.cat([frames, frames[:, -1:].expand(-1, 3, -1, -1)], dim=1)
    assert padded.shape[1] == 33
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        expected = tokenizer.encode(padded.unsqueeze(0))
    assert torch.equal(tensors["ids"], expected)
    assert header.video == (33, 24, 32)
    assert header.source is not None
    assert (header.source.frames, header.source.fps) == (30, 12.0)


def test_detokenized_frames_are_the_decoders(
    done: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    tokens, video = tmp_path / "t.safetensors", tmp_path / "v.mp4"
    done("tokenize", clip, "-o", tokens, "--tokenizer", models.tokenizer, "--frames", "7")
    done("detokenize", tokens, "-o", video, "--tokenizer", models.tokenizer, "--crf", "0")
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        expected = tokenizer.decode(load_tokens(tokens)[1]["ids"])[0, :, :7]
    write_video(tmp_path / "expected.mp4", expected, 12.0, crf=0)
    difference = read_video(video) - read_video(tmp_path / "expected.mp4")
    assert difference.abs().max() <= 2 / 255  # chunks may round differently from the whole


@pytest.mark.parametrize("frames", [1, 8, 9, 30])
def test_round_trip_clip_by_clip(
    cli: Callable, first_generation: list[str], clip: str, tmp_path: Path, frames: int
) -> None:
    """MAGVIT's tokens depend on their whole clip: a video is cut into clips, the last one filled."""
    tokens, video = tmp_path / "clip.safetensors", tmp_path / "again.mp4"
    model = first_generation[:2]
    words = ("--frames", str(frames), "--clip-frames", "8", "--json")
    result = cli("tokenize", clip, "-o", tokens, *model, *words)
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    clips = -(-frames // 8)
    assert (facts["frames"], facts["clip_frames"]) == (frames, 8)
    assert facts["grid"] == [4 * clips, 6, 8]
    header, tensors = load_tokens(tokens)
    assert (header.clip, header.video) == (8, (8 * clips, 24, 32))
    whole = read_video(clip, frames=frames)
    whole = torch.cat([whole, whole[:, -1:].expand(-1, 8 * clips - frames, -1, -1)], dim=1)
    tokenizer = MagvitTokenizer.from_pretrained(model[1])
    with torch.inference_mode():
        pieces = [tokenizer.encode(part.unsqueeze(0)) for part in whole.split(8, dim=1)]
        expected = torch.cat([tokenizer.decode(ids)[0] for ids in pieces], dim=1)[:, :frames]
    assert torch.equal(tensors["ids"], torch.cat(pieces, dim=1))

    result = cli("detokenize", tokens, "-o", video, *model, "--crf", "0", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["frames"] == probe(video).frames == frames
    write_video(tmp_path / "expected.mp4", expected, 12.0, crf=0)
    assert (read_video(video) - read_video(tmp_path / "expected.mp4")).abs().max() <= 2 / 255


@pytest.mark.parametrize("frames", [1, 9, 10, 30])
def test_round_trip_clip_by_clip_of_a_causal_tokenizer(
    cli: Callable, models: Any, clip: str, tmp_path: Path, frames: int
) -> None:
    """Where norms span the clip (Open-MAGVIT2), each has its own slot 0 of a single frame."""
    tokens, video, folder = (tmp_path / name for name in ("t.safetensors", "v.mp4", "model"))
    config = MagvitV2Tokenizer.from_pretrained(models.tokenizer).config
    torch.manual_seed(0)
    tokenizer = MagvitV2Tokenizer(dataclasses.replace(config, clip_norms=True)).eval()
    tokenizer.save_pretrained(folder)
    words = ("--tokenizer", folder, "--json")
    cut = ("--frames", str(frames), "--clip-frames", "9")
    result = cli("tokenize", clip, "-o", tokens, *words, *cut)
    assert result.status == 0, result.err
    facts, clips = json.loads(result.out), -(-frames // 9)
    assert (facts["frames"], facts["clip_frames"]) == (frames, 9)
    assert facts["grid"] == [3 * clips, 6, 8]
    header, tensors = load_tokens(tokens)
    assert (header.clip, header.video) == (9, (9 * clips, 24, 32))
    whole = read_video(clip, frames=frames)
    whole = torch.cat([whole, whole[:, -1:].expand(-1, 9 * clips - frames, -1, -1)], dim=1)
    with torch.inference_mode():
        pieces = [tokenizer.encode(part.unsqueeze(0)) for part in whole.split(9, dim=1)]
        expected = torch.cat([tokenizer.decode(ids)[0] for ids in pieces], dim=1)[:, :frames]
    assert torch.equal(tensors["ids"], torch.cat(pieces, dim=1))

    result = cli("detokenize", tokens, "-o", video, *words, "--crf", "0")
    assert result.status == 0, result.err
    assert json.loads(result.out)["frames"] == probe(video).frames == frames
    write_video(tmp_path / "expected.mp4", expected, 12.0, crf=0)
    assert (read_video(video) - read_video(tmp_path / "expected.mp4")).abs().max() <= 2 / 255
    if frames == 30:
        assert cli("tokenize", clip, "-o", tokens, *words).status == 0  # 17 frames unless told
        assert load_tokens(tokens)[0].video == (34, 24, 32)
        line = cli("tokenize", clip, "-o", tokens, *words, "--clip-frames", "8").err
        assert "--clip-frames: expected 1 + 4k, got 8" in line


def test_clips_of_16_frames_unless_told(
    cli: Callable, first_generation: list[str], clip: str, tmp_path: Path
) -> None:
    tokens = tmp_path / "t.safetensors"
    result = cli("tokenize", clip, "-o", tokens, *first_generation[:2])
    assert "clips of 16 frames" in result.out
    assert load_tokens(tokens)[0].video == (32, 24, 32)


def test_clips_that_do_not_fit(
    done: Callable, fails: Callable, models: Any, first_generation: list[str], clip: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    tokens, model = tmp_path / "t.safetensors", first_generation[:2]
    line = fails("tokenize", clip, "-o", tokens, *model, "--clip-frames", "7")
    assert "--clip-frames: expected a multiple of 2, got 7" in line
    line = fails(
        "tokenize", clip, "-o", tokens, "--tokenizer", models.tokenizer, "--clip-frames", "8"
    )
    assert "leave it out" in line
    done("tokenize", clip, "-o", tokens, *model, "--clip-frames", "8")
    header, tensors = load_tokens(tokens)
    wrong = dataclasses.replace(header, grid=(15, 6, 8))
    save_tokens(tokens, wrong, tensors["ids"][:, :15])
    line = fails("detokenize", tokens, "-o", tmp_path / "v.mp4", *model)
    assert f"{tokens}: its 15 slots are no whole clips of 8 frames" in line


def test_text_output_names_rate_and_file(
    cli: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    tokens = tmp_path / "t.safetensors"
    result = cli("tokenize", clip, "-o", tokens, "--tokenizer", models.tokenizer, "--frames", "5")
    for word in ("5 frames of 24 x 32", "bits per pixel", "frames/s", str(tokens)):
        assert word in result.out
    result = cli("detokenize", tokens, "-o", tmp_path / "v.mp4", "--tokenizer", models.tokenizer)
    assert "5 frames of 24 x 32 at 12 frames/s" in result.out


def test_start_stride_and_size(cli: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    options = ("--start", "2", "--stride", "3", "--size", "16x20")
    result = cli("tokenize", clip, "-o", path, "--tokenizer", models.tokenizer, *options, "--json")
    facts = json.loads(result.out)
    assert facts["frames"] == len(range(2, 30, 3))
    header, tensors = load_tokens(path)
    assert header.source is not None
    assert header.source.fps == 4.0
    assert header.video[1:] == (16, 20)
    frames = read_video(clip, start=2, stride=3, size=(16, 20))
    frames = torch.cat([frames, frames[:, -1:].expand(-1, 3, -1, -1)], dim=1)
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        assert torch.equal(tensors["ids"], tokenizer.encode(frames.unsqueeze(0)))


def test_odd_sizes_are_cropped_to_whole_tokens(cli: Callable, models: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", torch.rand(3, 5, 27, 21))
    result = cli(
        "tokenize", tmp_path / "odd.mp4", "-o", tmp_path / "t", "--tokenizer", models.tokenizer,
        "--json",
    )  # fmt: skip
    assert json.loads(result.out)["size"] == [28, 20]  # of 28 x 22 in the file


def test_bad_videos(fails: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "t.safetensors"
    model = ("-o", out, "--tokenizer", models.tokenizer)
    assert "no such file" in fails("tokenize", tmp_path / "none.mp4", *model)
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in fails("tokenize", tmp_path / "empty.mp4", *model)
    (tmp_path / "cut.mp4").write_bytes(Path(clip).read_bytes()[:900])
    assert "cut.mp4" in fails("tokenize", tmp_path / "cut.mp4", *model)
    assert "is a directory" in fails("tokenize", tmp_path, *model)
    assert "none from --start 30" in fails("tokenize", clip, *model, "--start", "30")
    write_video(tmp_path / "tiny.mp4", torch.rand(3, 2, 2, 8))
    assert "smaller than one 4 x 4 token" in fails("tokenize", tmp_path / "tiny.mp4", *model)
    assert "multiples of 4, got 10 x 10" in fails("tokenize", clip, *model, "--size", "10")
    assert not out.exists()


def test_bad_tokenizer_directories(fails: Callable, clip: str, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "t.safetensors")
    assert "no such directory" in fails("tokenize", clip, *out, "--tokenizer", tmp_path / "none")
    assert "config.json" in fails("tokenize", clip, *out, "--tokenizer", tmp_path)


def test_wrong_tokenizer_names_both(
    done: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    path, video = tmp_path / "t.safetensors", tmp_path / "v.mp4"
    done("tokenize", clip, "-o", path, "--tokenizer", models.tokenizer, "--frames", "5")
    line = fails("detokenize", path, "-o", video, "--tokenizer", models.other_tokenizer)
    assert str(path) in line
    assert "made by another tokenizer" in line
    assert load_tokens(path)[0].fingerprint in line
    assert not video.exists()


def test_bad_token_files(
    done: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    path, video = tmp_path / "t.safetensors", tmp_path / "v.mp4"
    output = ("-o", video, "--tokenizer", models.tokenizer)
    done("tokenize", clip, "-o", path, "--tokenizer", models.tokenizer, "--frames", "5")
    whole = path.read_bytes()

    assert "no such token file" in fails("detokenize", tmp_path / "none", *output)
    assert clip in fails("detokenize", clip, *output)
    path.write_bytes(whole[: len(whole) - 10])
    assert str(path) in fails("detokenize", path, *output)
    damaged = bytearray(whole)
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    assert "checksum" in fails("detokenize", path, *output)
    save_file({"ids": torch.zeros(1, 2, 6, 8)}, path)
    assert "holds no tokens of this project" in fails("detokenize", path, *output)
    path.write_bytes(b"")
    assert str(path) in fails("detokenize", path, *output)
    assert not video.exists()


def test_training_shards_are_not_videos(
    done: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.safetensors"
    done("tokenize", clip, "-o", path, "--tokenizer", models.tokenizer, "--frames", "5")
    header, tensors = load_tokens(path)
    shard = TokenHeader(header.fingerprint, header.num_bits, header.grid, header.video)
    save_tokens(path, shard, tensors["ids"].repeat(3, 1, 1, 1))
    line = fails("detokenize", path, "-o", tmp_path / "v.mp4", "--tokenizer", models.tokenizer)
    assert "3 clips of a training set" in line


@pytest.mark.parametrize("command", ["tokenize", "detokenize"])
def test_full_disk_keeps_the_old_output(
    done: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path, command: str
) -> None:
    tokens = tmp_path / "tokens.safetensors"
    model = ("--tokenizer", models.tokenizer)
    done("tokenize", clip, "-o", tokens, *model)
    output = tmp_path / "out" / "file.mp4"
    output.parent.mkdir()
    output.write_bytes(b"old")
    source = clip if command == "tokenize" else tokens
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        line = fails(command, source, "-o", output, *model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {output}" in line
    assert output.read_bytes() == b"old"
    assert [entry.name for entry in output.parent.iterdir()] == ["file.mp4"]


def test_trouble_with_the_output_comes_before_the_work(
    done: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    model = ("--tokenizer", models.tokenizer)
    assert "is also the input" in fails("tokenize", clip, "-o", clip, *model)
    assert probe(clip).frames == 30
    assert "is a directory" in fails("tokenize", clip, "-o", tmp_path, *model)
    (tmp_path / "file").touch()
    assert "cannot write" in fails("tokenize", clip, "-o", tmp_path / "file" / "t", *model)
    tokens = tmp_path / "t.safetensors"
    done("tokenize", clip, "-o", tokens, *model, "--frames", "5")
    assert "is also the input" in fails("detokenize", tokens, "-o", tokens, *model)
    assert load_tokens(tokens)[1]["ids"].shape == (1, 2, 6, 8)


def test_detokenized_images_and_names_that_promise_something_else(
    cli: Callable, done: Callable, fails: Callable, models: Any, clip: str, tmp_path: Path
) -> None:
    model, tokens = ("--tokenizer", models.tokenizer), tmp_path / "t.safetensors"
    done("tokenize", clip, "-o", tokens, *model, "--frames", "1")
    result = cli("detokenize", tokens, "-o", tmp_path / "x.png", *model, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["frames"] == 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        expected = tokenizer.decode(load_tokens(tokens)[1]["ids"])[0]
    assert (read_video(tmp_path / "x.png") - expected).abs().max() <= 0.5 / 255 + 1e-6
    for suffix in (".jpg", ".webm"):
        line = fails("detokenize", tokens, "-o", tmp_path / f"x{suffix}", *model)
        assert f".mp4 (a video) or .png (a single image), got {suffix}" in line
    done("tokenize", clip, "-o", tokens, *model, "--frames", "5")
    line = fails("detokenize", tokens, "-o", tmp_path / "y.png", *model)
    assert "a .png holds one image, but the result has 5 frames" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.safetensors", "x.png"]


def interrupted(words: list[Any], out: Path, number: signal.Signals) -> tuple[int, str]:
    """Status and messages of a command that got a signal when it had begun to write into `out`."""
    # Shells start background jobs, such as a whole test run, with SIGINT ignored.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from magvit_fast.cli.main import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    while not any(out.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, number)
    with process.stderr:
        text = process.stderr.read()
    return process.wait(timeout=60), text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_detokenize_leaves_nothing(
    done: Callable, models: Any, tmp_path: Path, number: signal.Signals
) -> None:
    long = tmp_path / "long.mp4"
    write_video(long, torch.rand(3, 1, 32, 32).expand(-1, 240, -1, -1))
    tokens, model = tmp_path / "t.safetensors", ["--tokenizer", models.tokenizer]
    done("tokenize", long, "-o", tokens, *model)
    for attempt in range(5):  # on a busy machine it may be done before the signal goes out
        out = tmp_path / f"out{attempt}"
        out.mkdir()
        status, text = interrupted(["detokenize", tokens, "-o", out / "v.mp4", *model], out, number)
        if status != 0:
            break
    assert status == 130
    assert "interrupted" in text
    assert "Traceback" not in text
    assert not list(out.iterdir())
