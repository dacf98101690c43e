"""`magvit-fast tokenize VIDEO -o TOKENS`: a video file -> tokens, in memory that does not grow."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast.cli.progress import Advance, progress
from magvit_fast.cli.runtime import (
    Outcome,
    add_tokenizer_option,
    check_output,
    frame_size,
    implementation,
    load_tokenizer,
    positive_int,
    running,
    table,
)
from magvit_fast.data.tokens import (
    TokenHeader,
    VideoSource,
    save_tokens,
    tokenizer_fingerprint,
)
from magvit_fast.data.video import VideoInfo, iter_frames, probe
from magvit_fast.errors import FileFormatError
from magvit_fast.metrics import (
    bits_per_pixel,
    codebook_counts,
    codebook_perplexity,
    codebook_usage,
    entropy_coded_bits,
    fixed_length_bits,
)
from magvit_fast.models.tokenizers import VideoTokenizer

HELP = "Turn a video file into a token file."
_PIECE = 16  # frames decoded before the network sees them
_CLIP = 16  # frames of a clip of MAGVIT; one more where slot 0 is a single frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="any file that FFmpeg reads")
    parser.add_argument("-o", "--output", metavar="TOKENS", required=True, help=".safetensors file")
    add_tokenizer_option(parser)
    parser.add_argument(
        "--size",
        type=frame_size,
        metavar="N|HxW",
        help="center-crop and resize (default: keep the size, cropped to what the tokenizer takes)",
    )
    parser.add_argument("--start", type=int, default=0, help="first frame (default 0)")
    parser.add_argument("--frames", type=positive_int, help="at most so many (default: all)")
    parser.add_argument("--stride", type=positive_int, default=1, help="take every N-th frame")
    parser.add_argument(
        "--clip-frames", type=positive_int, metavar="N",
        help="for tokenizers that look ahead (MAGVIT): encode clips of N frames (default 16; 17 "
        "where slot 0 is a single frame)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Outcome:
    with running(args) as device:
        tokenizer = load_tokenizer(args.tokenizer, device)
        video = probe(args.video)
        check_output(args.output, args.video)
        size = args.size or _fitting_size(tokenizer, video)
        clip = _clip_frames(tokenizer, args.clip_frames)
        began = time.perf_counter()
        ids, frames = _encode(tokenizer, video, size, clip, args, device)
        elapsed = time.perf_counter() - began
        facts: dict[str, Any] = {
            "input": args.video,
            "output": args.output,
            "frames": frames,
            **token_facts(ids, tokenizer.config.num_bits, frames, size),
            "clip_frames": clip,
            "seconds": elapsed,
            "frames_per_second": frames / elapsed,
            "impl": implementation(device),
            "device": str(device),
        }
        source = VideoSource(frames, video.height, video.width, video.fps / args.stride)
        write_tokens(args.output, tokenizer, ids, size, source, clip)
    return Outcome(facts, _text(facts, Path(args.output)))


def write_tokens(
    path: str | Path,
    tokenizer: VideoTokenizer,
    ids: Tensor,
    size: tuple[int, int],
    source: VideoSource,
    clip: int | None = None,
) -> None:
    """ids [1, T', H', W'] of one video of `size` pixels, with what `detokenize` needs to know.

    clip: frames of each of the clips that were encoded one by one; None for a single piece.
    """
    lead, step = int(tokenizer.config.causal), tokenizer.config.time_stride
    frames = lead + (ids.shape[1] - lead) * step
    if clip is not None:
        frames = ids.shape[1] // slots_of_clip(tokenizer, clip) * clip
    grid = (ids.shape[1], ids.shape[2], ids.shape[3])
    fingerprint = tokenizer_fingerprint(tokenizer)
    header = TokenHeader(
        fingerprint, tokenizer.config.num_bits, grid, (frames, *size), source, clip
    )
    save_tokens(path, header, ids.cpu())


def slots_of_clip(tokenizer: VideoTokenizer, frames: int) -> int:
    """Latent slots of a clip of so many frames."""
    return tokenizer.config.latent_shape(frames, 1, 1)[0]


def token_facts(ids: Tensor, num_bits: int, frames: int, size: tuple[int, int]) -> dict[str, Any]:
    """Counts, codebook use and rates of one video's tokens; `frames` counts true frames."""
    counts = codebook_counts(ids, 2**num_bits)
    return {
        "size": list(size),
        "grid": list(ids.shape[1:]),
        "tokens": ids.numel(),
        "bits_per_token": num_bits,
        "bits_per_pixel": bits_per_pixel(fixed_length_bits(ids.numel(), num_bits), frames, *size),
        "bits_per_pixel_entropy_coded": bits_per_pixel(
            entropy_coded_bits(ids, num_bits), frames, *size
        ),
        "codebook_usage": codebook_usage(counts),
        "codebook_perplexity": codebook_perplexity(counts),
    }


def _fitting_size(tokenizer: VideoTokenizer, video: VideoInfo) -> tuple[int, int]:
    step = tokenizer.config.space_stride
    height, width = video.height // step * step, video.width // step * step
    if not height or not width:
        raise FileFormatError(
            f"{video.path}: its frames of {video.height} x {video.width} are smaller than one "
            f"{step} x {step} token; enlarge them with --size"
        )
    return height, width


def _clip_frames(tokenizer: VideoTokenizer, asked: int | None) -> int | None:
    """Frames of a clip that is encoded by itself; None for a tokenizer that streams."""
    lead, step = int(tokenizer.config.causal), tokenizer.config.time_stride
    if tokenizer.streams:
        if asked is not None:
            raise ValueError(
                "--clip-frames: this tokenizer takes a video as a whole, piece by piece; leave it out"
            )
        return None
    clip = asked or lead + max(1, _CLIP // step) * step
    if (clip - lead) % step:
        expected = f"1 + {step}k" if lead else f"a multiple of {step}"
        raise ValueError(f"--clip-frames: expected {expected}, got {clip}")
    return clip


def _encode(
    tokenizer: VideoTokenizer,
    video: VideoInfo,
    size: tuple[int, int],
    clip: int | None,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[Tensor, int]:
    """ids int64 [1, T', H', W'] on the CPU and the number of true frames."""
    frames = itertools.islice(
        iter_frames(args.video, size=size, start=args.start, stride=args.stride), args.frames
    )
    expected = len(range(args.start, video.frames, args.stride))
    total = expected if args.frames is None else min(args.frames, expected)
    with progress("tokenize", total, "frames") as advance:
        counted = _Counted(frames, advance)
        if clip is None:
            first = int(tokenizer.config.causal)
            whole = _filled(counted, tokenizer.config.time_stride, first)
            chunks = tokenizer.encode_stream(_pieces(whole, _PIECE, device))
        else:
            clips = _pieces(_filled(counted, clip, 0), clip, device)
            chunks = (tokenizer.encode(piece) for piece in clips)
        ids = [chunk.cpu() for chunk in chunks] if total else []
    if not ids:
        raise FileFormatError(
            f"{args.video}: has {video.frames} frames, none from --start {args.start} on; "
            "start earlier"
        )
    return torch.cat(ids, dim=1), counted.count


class _Counted:
    """Frames on their way to the network, counted and shown."""

    def __init__(self, frames: Iterable[Tensor], advance: Advance) -> None:
        self.count = 0
        self._frames, self._advance = frames, advance

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self._frames:
            yield frame
            self.count += 1
            self._advance(1)


def _filled(frames: Iterable[Tensor], step: int, first: int) -> Iterator[Tensor]:
    """Repeat the last frame until first + step * k are there: whole slots, or whole clips."""
    count, last = 0, None
    for last in frames:
        yield last
        count += 1
    if last is not None:
        yield from itertools.repeat(last, (first - count) % step)


def _pieces(frames: Iterator[Tensor], size: int, device: torch.device) -> Iterator[Tensor]:
    """[1, 3, n, H, W] at a time."""
    while piece := list(itertools.islice(frames, size)):
        yield torch.stack(piece, dim=1).unsqueeze(0).to(device)


def _text(facts: dict[str, Any], output: Path) -> str:
    height, width = facts["size"]
    return table(
        {
            "video": f"{facts['frames']} frames of {height} x {width}",
            "tokens": f"{facts['tokens']} of {facts['bits_per_token']} bits "
            f"({' x '.join(map(str, facts['grid']))})"
            + (f", clips of {facts['clip_frames']} frames" if facts["clip_frames"] else ""),
            "rate": f"{facts['bits_per_pixel']:.4f} bits per pixel, "
            f"{facts['bits_per_pixel_entropy_coded']:.4f} entropy-coded",
            "codebook": f"{facts['codebook_usage']:.1%} used, "
            f"perplexity {facts['codebook_perplexity']:.0f}",
            "speed": f"{facts['frames_per_second']:.1f} frames/s on {facts['device']} "
            f"({facts['impl']})",
            "written": f"{output} ({output.stat().st_size:,} bytes)",
        }
    )
