"""Checkpoints of a training run: whole or absent, not pickled, for any number of processes.

A checkpoint is a folder step-XXXXXXXX: model.safetensors (every module by name, averages too),
optimizer.safetensors, and training.json (step, recipe, gradient scaler). Learning rates, random
numbers and the position in the data are functions of the step and need no storage.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from magvit_fast.data.atomic import atomic_directory, atomic_write_text
from magvit_fast.errors import FileFormatError

FORMAT = "magvit_fast.training"
VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What may differ between a run and its continuation without changing what is computed.
_OPERATIONAL = frozenset(
    ["output", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard"]
)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state dict of an unwrapped, unsharded module, on the CPU. Called by every process."""
    return get_model_state_dict(module, options=_WHOLE)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None. Half-written ones have other names."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return max(found, default=None)


def save_checkpoint(
    accelerator: Any,
    folder: Path,
    step: int,
    *,
    modules: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
    keep: int,
) -> Path:
    """Write folder/step-XXXXXXXX; delete all but the `keep` newest. Called by every process."""
    # Collective where weights are sharded: every process takes part, the first one writes.
    model_state = whole_state(modules)
    optimizer_state = _optimizer_state(modules, optimizer)
    path = folder / f"step-{step:08d}"
    if accelerator.is_main_process:
        scaler = accelerator.scaler
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "recipe": recipe,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "optimizer_groups": optimizer_state["param_groups"],
        }
        with atomic_directory(path) as temporary:
            save_file(_plain(model_state), temporary / "model.safetensors")
            save_file(_flat(optimizer_state["state"]), temporary / "optimizer.safetensors")
            atomic_write_text(temporary / "training.json", json.dumps(facts, indent=1) + "\n")
        _prune(folder, keep)
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(
    accelerator: Any,
    path: Path,
    *,
    modules: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
) -> int:
    """Restore everything that `save_checkpoint` wrote; returns the number of steps done.

    Raises FileFormatError for a damaged checkpoint or one of another recipe (it names the keys).
    """
    try:
        facts = json.loads((path / "training.json").read_text(encoding="utf-8"))
        model_state: dict[str, Any] = dict(load_file(path / "model.safetensors"))
        flat = load_file(path / "optimizer.safetensors")
        if facts["format"] != FORMAT or facts["version"] != VERSION:
            raise ValueError(f"its format is {facts['format']} version {facts['version']}")
        step, written = int(facts["step"]), facts["recipe"]
        optimizer_state: Any = {"state": _nested(flat), "param_groups": facts["optimizer_groups"]}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path}: cannot be continued from ({error}); delete this folder to go on from the "
            "checkpoint before it"
        ) from error
    _check_recipe(path, written, recipe)
    set_model_state_dict(modules, model_state, options=_WHOLE)
    _set_optimizer_state(modules, optimizer, optimizer_state)
    if accelerator.scaler is not None and facts["scaler"]:
        accelerator.scaler.load_state_dict(facts["scaler"])
    return step


def _optimizer_state(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's whole state by the names of the parameters; empty before its first step."""
    optimizer = _unwrapped(optimizer)
    stepped = bool(optimizer.state)
    state: dict[str, Any] = dict(get_optimizer_state_dict(modules, optimizer, options=_WHOLE))
    if not stepped:  # torch has made one by a step of its own, which must not be counted
        optimizer.state.clear()
        state["state"] = {}
    return state


def _set_optimizer_state(
    modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    optimizer = _unwrapped(optimizer)
    if state["state"]:
        set_optimizer_state_dict(modules, optimizer, state, options=_WHOLE)
    else:  # written before the first step that was not skipped
        optimizer.state.clear()


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper. Torch makes a missing state by step() with gradients of zero; the
    wrapper would ask the gradient scaler for that step, which has no scale before the first loss."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _plain(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in state.items()}


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{parameter}/{entry}": torch.as_tensor(value).contiguous().clone()
        for parameter, entries in state.items()
        for entry, value in entries.items()
    }


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        parameter, _, entry = key.rpartition("/")
        state.setdefault(parameter, {})[entry] = value
    return state


def _prune(folder: Path, keep: int) -> None:
    """Delete old checkpoints, and what an interrupted writer left behind."""
    done = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name))
    for path in [*done[:-keep], *folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def _check_recipe(path: Path, written: Any, wanted: Any) -> None:
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    different = _differences(written, wanted, "")
    if different:
        raise FileFormatError(
            f"{path}: was written by another recipe ({'; '.join(different)}); continue with the "
            "recipe it was started with, or choose another run.output"
        )


def _differences(written: Any, wanted: Any, prefix: str) -> list[str]:
    if not (isinstance(written, dict) and isinstance(wanted, dict)):
        return [] if written == wanted else [f"{prefix[:-1]}: {written!r} there, {wanted!r} now"]
    found: list[str] = []
    for key in sorted(written.keys() | wanted.keys()):
        if prefix == "run." and key in _OPERATIONAL:
            continue
        found += _differences(written.get(key), wanted.get(key), f"{prefix}{key}.")
    return found
