"""`magvit-fast evaluate VIDEO...`: quality and rate of reconstruction and prediction on files."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.cli.clips import copy_last, iter_clips
from magvit_fast.cli.generate import add_decoding_options, decoding_options
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import (
    Outcome,
    add_tokenizer_option,
    add_transformer_option,
    frame_size,
    implementation,
    load_any_tokenizer,
    load_transformer,
    positive_int,
    running,
    to_json,
)
from magvit_fast.data.atomic import atomic_write_text
from magvit_fast.data.video import probe
from magvit_fast.decoding import clip_geometry
from magvit_fast.metrics import (
    bits_per_pixel,
    codebook_counts,
    codebook_perplexity,
    codebook_usage,
    entropy_coded_bits,
    fixed_length_bits,
    psnr,
    ssim,
)
from magvit_fast.models.tokenizers import VideoTokenizer
from magvit_fast.tasks import FrameTask, get_task

HELP = "Measure reconstruction and prediction on video files: PSNR, SSIM, codebook use, bit rate."
Predict = Callable[[Tensor], tuple[Tensor, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="files that FFmpeg reads")
    add_tokenizer_option(parser)
    add_transformer_option(parser)
    parser.add_argument(
        "--prediction", action="store_true", help="also continue each clip from its first frames"
    )
    parser.add_argument(
        "--frames", type=positive_int, default=17, help="of a clip (default 17; MAGVIT: 16)"
    )
    parser.add_argument(
        "--size", type=frame_size, default=(64, 64), metavar="N|HxW", help="default 64"
    )
    parser.add_argument("--clips", type=positive_int, help="at most so many a file (default: all)")
    parser.add_argument("-o", "--output", metavar="JSON", help="also write the result to a file")
    add_decoding_options(parser)


def run(args: argparse.Namespace) -> Outcome:
    with running(args) as device:
        tokenizer = load_any_tokenizer(args.tokenizer, device)
        shape, predict = (args.frames, *args.size), None
        if args.prediction:
            shape, predict = _predictor(tokenizer, args, device)
        counts = torch.zeros(2**tokenizer.config.num_bits, dtype=torch.int64)
        clips = {path: _clip_count(path, shape[0], args.clips) for path in args.videos}
        rows: list[dict[str, Any]] = []
        with progress("evaluate", sum(clips.values()), "clips") as advance:
            rows.extend(
                _measure(path, tokenizer, shape, predict, args, counts, advance, device)
                for path in args.videos
            )
        facts: dict[str, Any] = {
            "shape": list(shape),
            "files": rows,
            "mean": _mean(rows),
            "codebook_usage": codebook_usage(counts),
            "codebook_perplexity": codebook_perplexity(counts),
            "impl": implementation(device),
            "device": str(device),
        }
    text = _text(facts)
    if args.output:
        atomic_write_text(args.output, to_json(facts) + "\n")
    return Outcome(facts, text)


def _predictor(
    tokenizer: VideoTokenizer, args: argparse.Namespace, device: torch.device
) -> tuple[tuple[int, int, int], Predict]:
    transformer = load_transformer(args.transformer, device)
    geometry = clip_geometry(tokenizer, transformer)
    task = get_task("frame_prediction")
    assert isinstance(task, FrameTask)
    given = task.num_first(geometry)
    options = decoding_options(args)

    def predict(clip: Tensor) -> tuple[Tensor, int]:
        video = mf.generate(
            tokenizer, transformer, task=task.name, video=clip[:, :, :given], **options
        )
        return video, given

    return geometry.size, predict


def _clip_count(path: str, frames: int, most: int | None) -> int:
    count = probe(path).frames // frames
    return count if most is None else min(count, most)


def _measure(
    path: str,
    tokenizer: VideoTokenizer,
    shape: tuple[int, int, int],
    predict: Predict | None,
    args: argparse.Namespace,
    counts: Tensor,
    advance: Callable[[int], None],
    device: torch.device,
) -> dict[str, Any]:
    """Scores of one file, averaged over its clips; `counts` [K] takes up its codes."""
    bits = tokenizer.config.num_bits
    scores: dict[str, list[float]] = {}
    found = []
    for clip in itertools.islice(iter_clips(path, shape), args.clips):
        ids = tokenizer.encode(clip.to(device))
        values = _compare("", tokenizer.decode(ids).cpu(), clip)
        if predict is not None:
            video, given = predict(clip.to(device))
            rest = clip[:, :, given:]
            values |= _compare("prediction_", video[:, :, given:].cpu(), rest)
            values["copy_last_frame_psnr"] = psnr(copy_last(clip, given), rest).item()
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
        found.append(ids.cpu())
        advance(1)
    ids = torch.cat(found)
    counts += codebook_counts(ids, 2**bits)
    frames = shape[0] * len(found)
    return {
        "file": path,
        "clips": len(found),
        **{name: sum(values) / len(values) for name, values in scores.items()},
        "bits_per_pixel": bits_per_pixel(fixed_length_bits(ids.numel(), bits), frames, *shape[1:]),
        "bits_per_pixel_entropy_coded": bits_per_pixel(
            entropy_coded_bits(ids, bits), frames, *shape[1:]
        ),
    }


def _compare(prefix: str, prediction: Tensor, target: Tensor) -> dict[str, float]:
    return {
        f"{prefix}psnr": psnr(prediction, target).item(),
        f"{prefix}ssim": ssim(prediction, target).item(),
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over all clips of all files."""
    total = sum(row["clips"] for row in rows)
    names = [name for name in rows[0] if name not in ("file", "clips")]
    mean = {name: sum(row[name] * row["clips"] for row in rows) / total for name in names}
    return {"clips": total, **mean}


def _text(facts: dict[str, Any]) -> str:
    columns = {
        "clips": "clips",
        "psnr": "PSNR",
        "ssim": "SSIM",
        "prediction_psnr": "pred. PSNR",
        "prediction_ssim": "pred. SSIM",
        "copy_last_frame_psnr": "copy PSNR",
        "bits_per_pixel": "bits/px",
        "bits_per_pixel_entropy_coded": "coded",
    }
    shown = [name for name in columns if name in facts["mean"]]
    rows = [*facts["files"], {"file": "mean over clips", **facts["mean"]}]
    width = max(len(row["file"]) for row in rows)
    lines = [" " * width + "".join(f"{columns[name]:>12}" for name in shown)]
    for row in rows:
        cells = (f"{row[n]:>12}" if n == "clips" else f"{row[n]:>12.4g}" for n in shown)
        lines.append(f"{row['file']:<{width}}" + "".join(cells))
    used, perplexity = facts["codebook_usage"], facts["codebook_perplexity"]
    return "\n".join([*lines, f"codebook: {used:.1%} used, perplexity {perplexity:.0f}"])
