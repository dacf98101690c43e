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
from magvit_fast.cli.progress import progress
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


def in_channels_last(model: nn.Module) -> nn.Module:
    """A copy with the weights of 2D and 3D convolutions in channels-last order, as `mf.patch` stores them."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            rank3 = isinstance(module, nn.Conv3d)
            order = torch.channels_last_3d if rank3 else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=order)
    return twin


def compare(
    model: nn.Module, video: Tensor, repeats: int, *, channels_last: bool = False
) -> dict[str, Any]:
    """Times, peak memory and agreement of `model` as it is and of a patched copy.

    With channels_last the unpatched model is measured in both memory formats, and what counts is the
    one that is faster over all parts. Results are compared in the model's dtype: the largest
    difference over the largest value.
    """
    patched_model = copy.deepcopy(model)
    report = mf.patch(patched_model, channels_last=channels_last)
    models = {"": model, "patched ": patched_model}
    if channels_last:
        models["channels_last "] = in_channels_last(model)
    with torch.inference_mode():
        codec: Any = model if hasattr(model, "encode") and hasattr(model, "decode") else None
        latent = None if codec is None else _tensor_of(codec.encode(video))
        candidates: dict[str, Callable[[], Tensor]] = {}
        for prefix, which in models.items():
            clip, code = video, latent
            if prefix == "channels_last ":
                clip = video.contiguous(memory_format=torch.channels_last_3d)
                if latent is not None and latent.dim() == 5:
                    code = latent.contiguous(memory_format=torch.channels_last_3d)
            candidates |= {prefix + name: run for name, run in parts(which, clip, code).items()}
        with progress("bench", repeats + 2, "rounds", still=True) as advance:
            results = {name: run() for name, run in candidates.items()}  # and a warm-up
            advance(1)
            seconds = median_seconds(candidates, video.device, repeats, warm=True, advance=advance)
            peaks = {name: peak_bytes(run, video.device) for name, run in candidates.items()}
            advance(1)
    names = [name.removeprefix("patched ") for name in candidates if name.startswith("patched ")]
    totals = {prefix: sum(seconds[prefix + name] for name in names) for prefix in models}
    before = min((p for p in models if p != "patched "), key=lambda p: totals[p])
    facts: dict[str, Any] = {
        "swapped": len(report.swapped),
        "left": [f"{e.name} ({e.module}): {e.note}" for e in report.left],
        "unpatched_format": before.strip() or "contiguous",
    }
    for name in names:
        ours, expected = results[f"patched {name}"], results[name]
        facts |= {
            f"{name}_seconds": seconds[before + name],
            f"patched_{name}_seconds": seconds[f"patched {name}"],
            f"{name}_speedup": seconds[before + name] / seconds[f"patched {name}"],
            f"{name}_peak_bytes": peaks[before + name],
            f"patched_{name}_peak_bytes": peaks[f"patched {name}"],
            f"{name}_difference": float((ours - expected).abs().max() / expected.abs().max()),
        }
    return facts | {"parts": names, "speedup": totals[before] / totals["patched "]}


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
        f"{facts['threads']} threads; {facts['swapped']} modules swapped; before: {facts['unpatched_format']}",
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
