"""`magvit-fast demo --out DIR`: a video file through the whole system, with pictures and numbers.

Video file -> decoder -> tokens -> reconstruction, and from its first frames -> masked transformer ->
prediction. The quality, the rate and the times that the report states are of this very run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.cli.clips import copy_last, read_clip
from magvit_fast.cli.generate import add_decoding_options, decoding_options
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import (
    Outcome,
    add_tokenizer_option,
    add_transformer_option,
    implementation,
    load_tokenizer,
    load_transformer,
    positive_int,
    running,
    table,
    to_json,
)
from magvit_fast.cli.sheet import check_matplotlib, write_sheet
from magvit_fast.cli.timing import median_seconds, tokenizer_seconds
from magvit_fast.cli.tokenize import token_facts, write_tokens
from magvit_fast.data.atomic import atomic_write_text
from magvit_fast.data.synthetic import demo_clip
from magvit_fast.data.tokens import VideoSource
from magvit_fast.data.video import probe, write_video
from magvit_fast.decoding import clip_geometry
from magvit_fast.metrics import psnr, ssim
from magvit_fast.models import VideoTransformer
from magvit_fast.models.tokenizers import VideoTokenizer
from magvit_fast.tasks import FrameTask, get_task

HELP = "Tokenize, rebuild and continue a clip; write videos, a picture and a report."
_CRF = 12.0  # finer than the usual 18: on small frames the codec must not be the story
_FPS = 8.0  # of the rendered scene: 17 frames in two seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="where the results go")
    parser.add_argument(
        "--video",
        metavar="FILE",
        help="any video: center-cropped and resized (default: a rendered scene)",
    )
    parser.add_argument("--start", type=int, default=0, help="first frame taken from --video")
    add_tokenizer_option(parser)
    add_transformer_option(parser)
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed runs (default 5)")
    add_decoding_options(parser)


@dataclass(frozen=True)
class _Scene:
    """Videos [1, 3, T, H, W] in [0, 1] on the CPU, tokens [1, T', H', W'], frames per second."""

    video: Tensor
    reconstruction: Tensor
    prediction: Tensor
    ids: Tensor
    given: int
    fps: float


def run(args: argparse.Namespace) -> Outcome:
    check_matplotlib()
    out = Path(args.out)
    with running(args) as device, progress("demo", 6, "stages") as advance:
        tokenizer = load_tokenizer(args.tokenizer, device)
        transformer = load_transformer(args.transformer, device)
        geometry = clip_geometry(tokenizer, transformer)
        video, fps = _input(args, geometry.size, out / "input.mp4")
        advance(1)
        given, predict = _predictor(tokenizer, transformer, video.to(device), args)
        ids = tokenizer.encode(video.to(device))
        reconstruction = tokenizer.decode(ids).cpu()
        advance(1)
        scene = _Scene(video, reconstruction, predict().cpu(), ids.cpu(), given, fps)
        advance(1)
        times = tokenizer_seconds(tokenizer, video.to(device), args.repeats)
        advance(1)
        again = median_seconds({"generate": predict}, device, min(args.repeats, 3), warm=True)
        times["generate_seconds"] = again["generate"]
        advance(1)
        report = {
            "input": args.video or "rendered scene",
            **_scores(scene, tokenizer.config.num_bits),
            **times,
            "decoding": decoding_options(args),
            "impl": implementation(device),
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "version": mf.__version__,
        }
        _write(out, tokenizer, scene, report)
        advance(1)
    return Outcome(report, _text(report, out))


def _input(
    args: argparse.Namespace, shape: tuple[int, int, int], path: Path
) -> tuple[Tensor, float]:
    """The clip [1, 3, T, H, W] as an H.264 file at `path`, read back through the decoder."""
    frames, height, _ = shape
    if args.video is None:
        pixels = torch.from_numpy(demo_clip(frames, height))
        clip, fps = pixels.permute(3, 0, 1, 2).unsqueeze(0), _FPS
    else:
        clip, fps = read_clip(args.video, shape, args.start), probe(args.video).fps
    write_video(path, clip[0], fps, crf=_CRF)
    return read_clip(str(path), shape), fps


def _predictor(
    tokenizer: VideoTokenizer,
    transformer: VideoTransformer,
    video: Tensor,
    args: argparse.Namespace,
) -> tuple[int, Callable[[], Tensor]]:
    """How many frames are given, and the prediction from them alone."""
    task = get_task("frame_prediction")
    assert isinstance(task, FrameTask)
    given = task.num_first(clip_geometry(tokenizer, transformer))
    predict = functools.partial(
        mf.generate,
        tokenizer,
        transformer,
        task=task.name,
        video=video[:, :, :given],
        **decoding_options(args),
    )
    return given, predict


def _scores(scene: _Scene, num_bits: int) -> dict[str, Any]:
    video, given = scene.video, scene.given
    rest, predicted = video[:, :, given:], scene.prediction[:, :, given:]
    frames, height, width = video.shape[2:]
    return {
        "frames": frames,
        "given_frames": given,
        "psnr_reconstruction": psnr(scene.reconstruction, video).item(),
        "ssim_reconstruction": ssim(scene.reconstruction, video).item(),
        "psnr_prediction": psnr(predicted, rest).item(),
        "ssim_prediction": ssim(predicted, rest).item(),
        "psnr_copy_last_frame": psnr(copy_last(video, given), rest).item(),
        **token_facts(scene.ids, num_bits, frames, (height, width)),
    }


def _write(out: Path, tokenizer: VideoTokenizer, scene: _Scene, report: dict[str, Any]) -> None:
    frames, height, width = scene.video.shape[2:]
    write_video(out / "reconstruction.mp4", scene.reconstruction[0], scene.fps, crf=_CRF)
    write_video(out / "prediction.mp4", scene.prediction[0], scene.fps, crf=_CRF)
    source = VideoSource(frames, height, width, scene.fps)
    write_tokens(out / "tokens.safetensors", tokenizer, scene.ids, (height, width), source)
    predicted = f"prediction\n{report['psnr_prediction']:.1f} dB"
    rows = {
        "input": scene.video[0],
        f"reconstruction\n{report['psnr_reconstruction']:.1f} dB": scene.reconstruction[0],
        predicted: scene.prediction[0],
    }
    write_sheet(out / "sheet.png", rows, scene.given, predicted=predicted)
    atomic_write_text(out / "report.json", to_json(report) + "\n")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _text(report: dict[str, Any], out: Path) -> str:
    gain = report["psnr_prediction"] - report["psnr_copy_last_frame"]
    made = report["frames"] - report["given_frames"]

    def time(part: str) -> str:
        ours, reference = report[f"{part}_seconds"], report[f"reference_{part}_seconds"]
        return f"{ours * 1e3:.1f} ms (pure PyTorch: {reference * 1e3:.1f} ms)"

    return table(
        {
            "input": f"{report['frames']} frames of {' x '.join(map(str, report['size']))}, "
            f"{report['input']}",
            "tokens": f"{report['tokens']} of {report['bits_per_token']} bits, "
            f"{report['bits_per_pixel']:.4f} bits per pixel "
            f"({report['bits_per_pixel_entropy_coded']:.4f} entropy-coded)",
            "reconstruction": f"{report['psnr_reconstruction']:.2f} dB PSNR, "
            f"{report['ssim_reconstruction']:.3f} SSIM",
            "prediction": f"{made} frames from the first {report['given_frames']}: "
            f"{report['psnr_prediction']:.2f} dB PSNR, {gain:+.2f} dB over copying the last one",
            "encode": time("encode"),
            "decode": time("decode"),
            "generate": f"{report['generate_seconds'] * 1e3:.0f} ms for "
            f"{report['decoding']['steps']} steps",
            "on": f"{report['device']}, {report['threads']} threads, {report['impl']}",
            "look at": out / "sheet.png",
            "and": ", ".join(
                str(out / name)
                for name in (
                    "input.mp4",
                    "reconstruction.mp4",
                    "prediction.mp4",
                    "tokens.safetensors",
                    "report.json",
                )
            ),
        }
    )
