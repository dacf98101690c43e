"""`magvit-fast bench`: how fast the tokenizer runs on this machine, native against pure PyTorch; or a
third-party model, as it is against patched.

The kernels one by one are measured by `make bench` in a clone of the project.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from magvit_fast.cli.bench_model import run_model
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import (
    Outcome,
    add_tokenizer_option,
    frame_size,
    implementation,
    load_tokenizer,
    positive_int,
    running,
    table,
)
from magvit_fast.cli.timing import tokenizer_seconds
from magvit_fast.models.tokenizers import tokenizer_from_preset

HELP = "Time encoding and decoding on this machine, native against pure PyTorch."
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tokenizer_option(parser)
    parser.add_argument("--preset", help="time a fresh model of this preset instead")
    parser.add_argument(
        "--model",
        metavar="MODULE:CLASS",
        help="time this model before and after mf.patch instead, as diffusers:AutoencoderKLWan",
    )
    parser.add_argument("--config", metavar="JSON", help="arguments of --model's class")
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="patch --model with channels_last=True, and hold it against the faster of both formats",
    )
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument("--frames", type=positive_int, help="default: 17; 16 for MAGVIT")
    parser.add_argument("--size", type=frame_size, default=(64, 64), metavar="N|HxW")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--repeats", type=positive_int, default=5)


def run(args: argparse.Namespace) -> Outcome:
    with running(args) as device:
        if args.model is not None:
            if args.preset is not None or args.tokenizer is not None:
                raise ValueError("--model: expected without --preset and --tokenizer")
            return run_model(args, device, _DTYPES[args.dtype])
        if args.config is not None or args.channels_last:
            raise ValueError("--config, --channels-last: expected with --model only")
        if args.preset is None:
            tokenizer = load_tokenizer(args.tokenizer, device)
        elif args.tokenizer is not None:
            raise ValueError("--preset: expected one of --preset and --tokenizer, got both")
        else:
            tokenizer = tokenizer_from_preset(args.preset).eval().to(device)
        dtype = _DTYPES[args.dtype]
        generator = torch.Generator().manual_seed(0)
        frames = args.frames or (17 if tokenizer.config.causal else 16)
        shape = (args.batch, 3, frames, *args.size)
        video = torch.rand(shape, generator=generator).to(device, dtype)
        with progress("bench", args.repeats + 1, "rounds", still=True) as advance:
            times = tokenizer_seconds(tokenizer.to(dtype), video, args.repeats, advance)
        facts: dict[str, Any] = {
            **times,
            "shape": list(shape),
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "impl": implementation(device),
            "device": str(device),
        }
    for part in ("encode", "decode"):
        facts[f"{part}_speedup"] = facts[f"reference_{part}_seconds"] / facts[f"{part}_seconds"]
    return Outcome(facts, _text(facts))


def _text(facts: dict[str, Any]) -> str:
    frames = facts["shape"][0] * facts["shape"][2]
    rows = {
        "clips": " x ".join(map(str, facts["shape"])) + f" {facts['dtype']}",
        "on": f"{facts['device']}, {facts['threads']} threads, {facts['impl']}",
    }
    for part in ("encode", "decode"):
        ours, reference = facts[f"{part}_seconds"], facts[f"reference_{part}_seconds"]
        rows[part] = (
            f"{ours * 1e3:8.1f} ms  {frames / ours:8.1f} frames/s  "
            f"(pure PyTorch {reference * 1e3:.1f} ms, ratio {reference / ours:.2f})"
        )
    return table(rows)
