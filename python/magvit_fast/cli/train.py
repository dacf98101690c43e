"""`magvit-fast train tokenizer|transformer CONFIG`: the two training stages, from a TOML recipe.

Several processes: `accelerate launch -m magvit_fast.cli.main train tokenizer CONFIG`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from magvit_fast import _native
from magvit_fast.cli.runtime import Outcome, pick_device, table

HELP = "Train a tokenizer or a masked transformer from a TOML recipe; a stopped run goes on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=("tokenizer", "transformer"))
    parser.add_argument("config", metavar="CONFIG", help="TOML recipe")


def run(args: argparse.Namespace) -> Outcome | None:
    from magvit_fast import training  # it loads torch.distributed: half as long as torch itself

    _choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    with _native.default_impl(args.impl):
        if args.stage == "tokenizer":
            result = training.train_tokenizer(
                training.load_recipe(args.config, training.TokenizerTraining)
            )
        else:
            result = training.train_transformer(training.load_transformer_recipe(args.config))
    if int(os.environ.get("RANK", "0")):  # one of several processes: the first one speaks
        return None
    last = result.history[-1] if result.history else {}
    facts: dict[str, Any] = {
        "stage": args.stage,
        "config": args.config,
        "output": str(result.output),
        "steps": result.steps,
        "replaced_clips": result.replaced,
        "last": last,
    }
    rows: dict[str, object] = {"steps": result.steps, "model": result.output}
    if result.replaced:
        rows["replaced"] = f"{result.replaced} clips of files that could not be decoded"
    rows |= {name: f"{value:.4g}" for name, value in last.items() if name != "step"}
    return Outcome(facts, table(rows))


def _choose_device(name: str) -> None:
    """Accelerate picks the devices (one a process); the environment tells it to stay on the CPU."""
    if name == "auto":
        return
    if pick_device(name).type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif name != "cuda":
        raise ValueError(
            f"--device: {name!r}: training takes the GPUs that CUDA_VISIBLE_DEVICES names; "
            "set it and leave --device out"
        )
