"""`magvit-fast detokenize TOKENS -o VIDEO`: tokens -> a video file, in memory that does not grow."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import (
    Outcome,
    add_tokenizer_option,
    check_output,
    check_result_name,
    implementation,
    load_tokenizer,
    running,
    table,
    write_result,
)
from magvit_fast.cli.tokenize import slots_of_clip
from magvit_fast.data.tokens import TokenHeader, load_tokens, tokenizer_fingerprint
from magvit_fast.errors import FileFormatError
from magvit_fast.models.tokenizers import VideoTokenizer

HELP = "Turn a token file back into a video file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokens", metavar="TOKENS", help="file written by `magvit-fast tokenize`")
    parser.add_argument(
        "-o", "--output", metavar="VIDEO", required=True,
        help=".mp4 file (H.264); .png for a single image",
    )  # fmt: skip
    add_tokenizer_option(parser)
    parser.add_argument(
        "--crf", type=float, default=18.0, help="H.264 quality: 0 (best) to 51 (default 18)"
    )


def run(args: argparse.Namespace) -> Outcome:
    with running(args) as device:
        tokenizer = load_tokenizer(args.tokenizer, device)
        header, tensors = load_tokens(args.tokens, fingerprint=tokenizer_fingerprint(tokenizer))
        ids, source = tensors["ids"], header.source
        if source is None or len(ids) != 1:
            raise FileFormatError(
                f"{args.tokens}: holds {len(ids)} clips of a training set, not one video; "
                "give a file written by `magvit-fast tokenize`"
            )
        check_output(args.output, args.tokens)
        check_result_name(args.output, source.frames)
        began = time.perf_counter()
        with progress("detokenize", source.frames, "frames") as advance:
            video = _decoded(args.tokens, tokenizer, header, ids.to(device))
            frames = itertools.islice(_frames(video), source.frames)  # the filled-in tail goes
            shown = _advancing(frames, advance)
            written = write_result(args.output, shown, source.frames, source.fps, crf=args.crf)
        elapsed = time.perf_counter() - began
        facts: dict[str, Any] = {
            "input": args.tokens,
            "output": args.output,
            "frames": written,
            "size": list(header.video[1:]),
            "fps": source.fps,
            "seconds": elapsed,
            "frames_per_second": written / elapsed,
            "impl": implementation(device),
            "device": str(device),
        }
    height, width = facts["size"]
    text = table(
        {
            "video": f"{written} frames of {height} x {width} at {source.fps:g} frames/s",
            "speed": f"{facts['frames_per_second']:.1f} frames/s on {device} ({facts['impl']})",
            "written": args.output,
        }
    )
    return Outcome(facts, text)


def _decoded(
    path: str, tokenizer: VideoTokenizer, header: TokenHeader, ids: Tensor
) -> Iterator[Tensor]:
    """Piece after piece, or clip after clip where the tokenizer looks ahead."""
    if tokenizer.streams:
        return tokenizer.decode_stream(ids)
    slots = slots_of_clip(tokenizer, header.clip or header.video[0])
    if slots < 1 or ids.shape[1] % slots:
        raise FileFormatError(
            f"{path}: its {ids.shape[1]} slots are no whole clips of {header.clip} frames; "
            "tokenize the video again"
        )
    return (tokenizer.decode(piece) for piece in ids.split(slots, dim=1))


def _frames(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """[1, 3, n, H, W] chunks -> frames [3, H, W]."""
    for chunk in chunks:
        yield from chunk[0].unbind(dim=1)


def _advancing(frames: Iterator[Tensor], advance: Any) -> Iterator[Tensor]:
    for frame in frames:
        yield frame
        advance(1)
