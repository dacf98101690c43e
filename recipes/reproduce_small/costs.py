"""Time and memory: masked against autoregressive decoding, windows against full attention.

Weights do not matter here, so the models are fresh ones of the sizes asked for. Memory is the peak of
a process of its own: `python -m recipes.reproduce_small.costs JSON` measures one model.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from magvit_fast.decoding import MaskedDecoding, decode_masked
from magvit_fast.decoding.autoregressive import AutoregressiveDecoding, decode_autoregressive
from magvit_fast.models import (
    AutoregressiveTransformer,
    MaskedTransformer,
    MaskedTransformerConfig,
    MaskViTConfig,
    MaskViTTransformer,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- decoding ------------------------------------------------------------------------------------
def decoding_costs(
    *, grids: list[list[int]], steps: int, repeats: int, model: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """For each grid: seconds a clip and forward passes of both ways to decode one, and the ratio.

    Both networks have the same layers; the autoregressive one keeps keys and values. Medians of
    `repeats` runs, the two ways in turn, one clip at a time, no condition.
    """
    return {f"{t}x{h}x{w}": _decoding_cost((t, h, w), steps, repeats, model) for t, h, w in grids}


def _decoding_cost(
    grid: tuple[int, int, int], steps: int, repeats: int, model: dict[str, Any]
) -> dict[str, float]:
    torch.manual_seed(0)
    config = MaskedTransformerConfig(grid=grid, dropout=0.0, **model)
    masked = MaskedTransformer(config).eval()
    sequential = AutoregressiveTransformer(config).eval()
    nothing = torch.zeros(1, config.num_tokens, dtype=torch.int64)
    settings = MaskedDecoding(steps=steps)
    ways: dict[str, Callable[[], Any]] = {
        "masked": lambda: decode_masked(
            masked, nothing, torch.zeros(config.num_tokens, dtype=torch.bool), settings
        ),
        "autoregressive": lambda: decode_autoregressive(sequential, AutoregressiveDecoding()),
    }
    found: dict[str, float] = {"tokens": config.num_tokens}
    for name, network in (("masked", masked), ("autoregressive", sequential)):
        found[f"passes_{name}"] = _count_passes(network, ways[name])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    for name, values in times.items():
        found[f"seconds_{name}"] = statistics.median(values)
    found["ratio"] = found["seconds_autoregressive"] / found["seconds_masked"]
    return found


def _count_passes(network: torch.nn.Module, way: Callable[[], Any]) -> int:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = network.register_forward_pre_hook(count)
    way()
    handle.remove()
    return passes


# ---- attention -----------------------------------------------------------------------------------
def attention_costs(
    *, shapes: dict[str, dict[str, Any]], variants: dict[str, dict[str, Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """For each shape and variant of MaskViT: seconds of a training step (forward and backward, one
    clip) and its peak memory in MiB beyond the idle process, each in a process of its own."""
    found = {}
    for shape, size in shapes.items():
        for name, changes in variants.items():
            request = {"config": {**size, **changes}, "repeats": repeats}
            command = [sys.executable, "-m", "recipes.reproduce_small.costs", json.dumps(request)]
            answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            found[f"{shape} {name}"] = json.loads(answer.stdout.splitlines()[-1])
    return found


def attention_cost(config: dict[str, Any], repeats: int) -> dict[str, float]:
    """One model, in this process (whose memory has not grown before)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = MaskViTConfig(**config)
    model = MaskViTTransformer(shape)
    ids = torch.randint(shape.codebook_size, (1, shape.frames, *shape.grid))
    unknown = torch.ones_like(ids, dtype=torch.bool)
    model(ids[:, :1], unknown[:, :1]).sum().backward()  # what a first call loads is not the step's
    idle = _peak_mib()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        model(ids, unknown).float().logsumexp(-1).mean().backward()
        times.append(time.perf_counter() - began)
    return {
        "tokens": ids.numel(),
        "seconds_step": statistics.median(times),
        "peak_mib": _peak_mib() - idle,
    }


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(attention_cost(**json.loads(sys.argv[1]))))
