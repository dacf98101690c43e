"""`magvit-fast evaluate VIDEO...`: quality and rate of reconstruction, and quality of generation."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.cli import generation_quality
from magvit_fast.cli.clips import check_shape, copy_last, iter_clips
from magvit_fast.cli.generate import add_decoding_options, decoding_options
from magvit_fast.cli.measures import (
    add_network_options,
    load_networks,
    measure_rows,
    named_networks,
)
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import (
    Outcome,
    Processes,
    add_tokenizer_option,
    add_transformer_option,
    check_output,
    frame_size,
    implementation,
    load_tokenizer,
    load_transformer,
    positive_int,
    running,
    several_processes,
    to_json,
)
from magvit_fast.data.atomic import atomic_write_text
from magvit_fast.data.clips import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_files
from magvit_fast.data.video import probe
from magvit_fast.decoding import clip_geometry
from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import (
    Evaluation,
    Networks,
    bits_per_pixel,
    codebook_counts,
    codebook_perplexity,
    codebook_usage,
    entropy_coded_bits,
    fixed_length_bits,
    psnr,
    ssim,
)
from magvit_fast.metrics.gather import from_all_processes
from magvit_fast.models.tokenizers import VideoTokenizer
from magvit_fast.tasks import FrameTask, get_task

HELP = "Measure reconstruction, prediction or any task on video files, also by published protocols."
Predict = Callable[[Tensor], tuple[Tensor, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "videos", metavar="VIDEO", nargs="+", help="files that FFmpeg reads, or folders of them"
    )
    add_tokenizer_option(parser)
    add_transformer_option(parser)
    parser.add_argument(
        "--prediction", action="store_true", help="also continue each clip from its first frames"
    )
    parser.add_argument(
        "--frames", type=positive_int, metavar="N",
        help="of a clip (default: 17; 16 for MAGVIT; else the models'); 1 takes images too",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=frame_size, metavar="N|HxW",
        help="default 64; the models' with --prediction, --task and --protocol",
    )  # fmt: skip
    parser.add_argument(
        "--clips", type=positive_int, help="at most so many a file (default: all; --task: 1)"
    )
    parser.add_argument("-o", "--output", metavar="JSON", help="also write the result to a file")
    add_decoding_options(parser)
    generation_quality.add_arguments(parser)
    add_network_options(parser)


def run(args: argparse.Namespace) -> Outcome | None:
    """None in all processes but the first."""
    with running(args) as device, several_processes(device) as processes:
        if args.output:
            check_output(args.output, *args.videos)
        files = _files(args.videos, images=args.frames == 1)
        tokenizer = load_tokenizer(args.tokenizer, processes.device)
        if args.task is not None or args.protocol is not None:
            transformer = load_transformer(args.transformer, processes.device)
            facts, text = generation_quality.measure_generation(
                files, tokenizer, transformer, args, processes.device, processes
            )
        else:
            if args.classes is not None:
                raise ValueError("--classes: reconstruction has no classes; leave it out")
            facts = _reconstruction(files, tokenizer, args, processes)
            text = _text(facts)
        facts |= {"impl": implementation(processes.device), "device": str(processes.device)}
        if processes.rank:
            return None
    if args.output:
        atomic_write_text(args.output, to_json(facts) + "\n")
    return Outcome(facts, text)


def _files(named: list[str], *, images: bool) -> list[Path]:
    """The files and those below the folders, with `images` image files among them.

    Raises FileFormatError where a folder has none.
    """
    wanted = VIDEO_SUFFIXES | IMAGE_SUFFIXES if images else VIDEO_SUFFIXES
    files: list[Path] = []
    for name in named:
        found = [Path(name)]
        if Path(name).is_dir():
            found = [f for f in list_files(name) if f.suffix.lower() in wanted]
        if not found:
            raise FileFormatError(
                f"{name}: holds no video file; give files, another folder, or --frames 1 for images"
            )
        files += found
    return files


def _reconstruction(
    files: list[Path], tokenizer: VideoTokenizer, args: argparse.Namespace, processes: Processes
) -> dict[str, Any]:
    """Every file belongs to one process; what they found is joined in the order of the files."""
    device, predict = processes.device, None
    shape = (args.frames or (17 if tokenizer.config.causal else 16), *(args.size or (64, 64)))
    if args.prediction:
        shape, predict = _predictor(tokenizer, args, device)
    networks = load_networks(args, device, shape[0])
    mine = files[processes.rank :: processes.count]
    clips = {path: _clip_count(path, shape[0], args.clips) for path in mine}
    run = _Reconstruction(tokenizer, shape, predict, args.clips, networks, device)
    with progress("evaluate", sum(clips.values()), "clips") as advance:
        rows = [run.measure(path, advance) for path in mine]
    parts = from_all_processes((rows, run.counts))
    every = [rows for rows, _ in parts]
    rows = [every[i % processes.count][i // processes.count] for i in range(len(files))]
    counts = torch.stack([part for _, part in parts]).sum(0)
    return {
        "shape": list(shape),
        "files": rows,
        "mean": _mean(rows),
        **{k: v for k, v in run.distances.results().items() if k != "samples"},
        "networks": named_networks(args),
        "codebook_usage": codebook_usage(counts),
        "codebook_perplexity": codebook_perplexity(counts),
    }


def _predictor(
    tokenizer: VideoTokenizer, args: argparse.Namespace, device: torch.device
) -> tuple[tuple[int, int, int], Predict]:
    transformer = load_transformer(args.transformer, device)
    geometry = clip_geometry(tokenizer, transformer)
    check_shape(args.frames, args.size, geometry)
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


def _clip_count(path: Path, frames: int, most: int | None) -> int:
    count = probe(path).frames // frames
    return count if most is None else min(count, most)


class _Reconstruction:
    """Scores file after file; takes up their codes and features on the way."""

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        shape: tuple[int, int, int],
        predict: Predict | None,
        most: int | None,
        networks: Networks,
        device: torch.device,
    ) -> None:
        self.tokenizer, self.shape, self.predict, self.most = tokenizer, shape, predict, most
        self.device, self.lpips = device, networks.lpips
        self.distances = Evaluation(dataclasses.replace(networks, lpips=None))
        self.counts = torch.zeros(2**tokenizer.config.num_bits, dtype=torch.int64)

    def measure(self, path: Path, advance: Callable[[int], None]) -> dict[str, Any]:
        """Scores of one file, averaged over its clips."""
        bits = self.tokenizer.config.num_bits
        scores = Evaluation(Networks(lpips=self.lpips))
        predicted: dict[str, list[float]] = {}
        found: list[Tensor] = []
        for clip in itertools.islice(iter_clips(path, self.shape), self.most):
            clip = clip.to(self.device)
            ids = self.tokenizer.encode(clip)
            rebuilt = self.tokenizer.decode(ids).float()
            scores.add(rebuilt, clip, clips=[len(found)])
            self.distances.add(rebuilt, clip, clips=[0], paired=False)
            if self.predict is not None:
                video, given = self.predict(clip)
                rest = clip[:, :, given:]
                values = _compare("prediction_", video[:, :, given:].float(), rest)
                values["copy_last_frame_psnr"] = psnr(copy_last(clip, given), rest).item()
                for name, value in values.items():
                    predicted.setdefault(name, []).append(value)
            found.append(ids.cpu())
            advance(1)
        ids = torch.cat(found)
        self.counts += codebook_counts(ids, 2**bits)
        pixels = (self.shape[0] * len(found), *self.shape[1:])
        return {
            "file": str(path),
            "clips": len(found),
            **scores.scores[0].mean(),
            **{name: sum(values) / len(values) for name, values in predicted.items()},
            "bits_per_pixel": bits_per_pixel(fixed_length_bits(ids.numel(), bits), *pixels),
            "bits_per_pixel_entropy_coded": bits_per_pixel(entropy_coded_bits(ids, bits), *pixels),
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
        "ms_ssim": "MS-SSIM",
        "lpips": "LPIPS",
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
    lines += [f"{name}: {value}" for name, value in measure_rows(facts).items()]
    used, perplexity = facts["codebook_usage"], facts["codebook_perplexity"]
    return "\n".join([*lines, f"codebook: {used:.1%} used, perplexity {perplexity:.0f}"])
