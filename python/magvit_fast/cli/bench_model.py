"""`magvit-fast bench --model`: a third-party model before and after `mf.patch`, on random weights."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import magvit_fast as mf
from magvit_fast.cli.runtime import Outcome
from magvit_fast.cli.timing import median_seconds, peak_bytes
from magvit_fast.errors import MissingExtraError


def build(path: str, config: str | None) -> nn.Module:
    """The class at `module:Class` with the arguments of a JSON object, in evaluation mode.

    Raises:
        ValueError: no such module or class, no JSON object, arguments that the class refuses.
        MissingExtraError: the module's package is not installed.
    """
    place, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(place), name)
    except ModuleNotFoundError as error:
        if error.name == place.partition(".")[0]:
            raise MissingExtraError(place.partition(".")[0], "compat", f"--model {path}") from error
        raise ValueError(f"--model: {path}: {error}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--model: expected MODULE:CLASS, got {path!r} ({error})") from error
    try:
        arguments = json.loads(config or "{}")
        model = found(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--config: {path} does not take {config or 'its defaults'}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model: {path} made a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model.eval()


def _tensor_of(result: Any) -> Tensor:
    """The tensor in whatever a model's encode or decode returns; of a distribution its mode."""
    for name in ("latent_dist", "latent", "sample"):
        inner = getattr(result, name, None)
        if inner is not None and not callable(inner):
            result = inner
            break
    if isinstance(result, (tuple, list)):
        result = result[0]
    if not isinstance(result, Tensor) and hasattr(result, "mode"):
        result = result.mode()
    if not isinstance(result, Tensor):
        raise ValueError(
            f"--model: expected a tensor inside its result, got {type(result).__name__}"
        )
    return result


def parts(model: Any, video: Tensor, latent: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """What is timed: encode of the video and decode of the latent, or forward without a latent."""
    if latent is None:
        return {"forward": lambda: _tensor_of(model(video))}
    return {
        "encode": lambda: _tensor_of(model.encode(video)),
        "decode": lambda: _tensor_of(model.decode(latent)),
    }


def compare(
    model: nn.Module, video: Tensor, repeats: int, *, channels_last: bool = False
) -> dict[str, Any]:
    """Times, peak memory and agreement of `model` as it is and of a patched copy.

    Results are compared in the model's dtype: the largest difference over the largest value.
    """
    twin = copy.deepcopy(model)
    report = mf.patch(twin, channels_last=channels_last)
    with torch.inference_mode():
        codec: Any = model if hasattr(model, "encode") and hasattr(model, "decode") else None
        latent = None if codec is None else _tensor_of(codec.encode(video))
        plain, patched = parts(model, video, latent), parts(twin, video, latent)
        expected = {name: run() for name, run in plain.items()}
        differences = {
            name: float((run() - expected[name]).abs().max() / expected[name].abs().max())
            for name, run in patched.items()
        }
        candidates = plain | {f"patched {name}": run for name, run in patched.items()}
        seconds = median_seconds(candidates, video.device, repeats, warm=True)
        peaks = {name: peak_bytes(run, video.device) for name, run in candidates.items()}
    facts: dict[str, Any] = {
        "swapped": len(report.swapped),
        "left": [f"{e.name} ({e.module}): {e.note}" for e in report.left],
    }
    for name in plain:
        facts |= {
            f"{name}_seconds": seconds[name],
            f"patched_{name}_seconds": seconds[f"patched {name}"],
            f"{name}_speedup": seconds[name] / seconds[f"patched {name}"],
            f"{name}_peak_bytes": peaks[name],
            f"patched_{name}_peak_bytes": peaks[f"patched {name}"],
            f"{name}_difference": differences[name],
        }
    ours, theirs = (sum(seconds[p + n] for n in plain) for p in ("patched ", ""))
    return facts | {"parts": list(plain), "speedup": theirs / ours}


def run_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Outcome:
    """The command, with --model."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build(args.model, args.config).to(device)
    model = model if dtype == torch.float32 else model.to(dtype)
    shape = (args.batch, 3, args.frames or 17, *args.size)
    video = (torch.rand(shape, generator=generator) * 2 - 1).to(device, dtype)
    facts = {
        "model": args.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": list(shape),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "channels_last": args.channels_last,
        **compare(model, video, args.repeats, channels_last=args.channels_last),
    }
    return Outcome(facts, _text(facts))


def _text(facts: dict[str, Any]) -> str:
    def size(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:,.0f} MiB"

    lines = [
        f"{facts['model']}, {facts['parameters'] / 1e6:.1f}M parameters, random weights",
        " x ".join(map(str, facts["shape"])) + f" {facts['dtype']} on {facts['device']}, "
        f"{facts['threads']} threads; {facts['swapped']} modules swapped",
        f"{'':8} {'before':>12} {'patched':>12} {'ratio':>7} {'peak before':>14} {'patched':>14} "
        f"{'difference':>11}",
    ]
    for name in facts["parts"]:
        before, after = facts[f"{name}_seconds"], facts[f"patched_{name}_seconds"]
        lines.append(
            f"{name:8} {before * 1e3:9.1f} ms {after * 1e3:9.1f} ms {before / after:6.2f}x "
            f"{size(facts[f'{name}_peak_bytes']):>14} {size(facts[f'patched_{name}_peak_bytes']):>14} "
            f"{facts[f'{name}_difference']:11.1e}"
        )
    lines += [f"left alone: {line}" for line in facts["left"]]
    return "\n".join(lines)
