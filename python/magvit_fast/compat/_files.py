"""Checkpoint files of other projects, read without running what a pickle asks for."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from magvit_fast.errors import FileFormatError


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What a .safetensors file or a file of torch.save holds, on the CPU.

    Pickles are read by torch's restricted reader (weights_only): tensors and plain containers. A file
    that asks for anything else is refused, and nothing of it is run.

    Raises:
        FileFormatError: the file is missing, damaged or holds other objects.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; expected a .safetensors, .ckpt or .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{path}: holds more than tensors, or is damaged ({_first_line(error)}); where you trust "
            "the file, store its state_dict alone as .safetensors and load that"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{path}: not a complete checkpoint ({_first_line(error)}); copy or download it again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def tensors_of(state: object, what: str) -> dict[str, Tensor]:
    """`state` as a state_dict.

    Raises:
        ValueError: it is no mapping from names to tensors.
    """
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{what}: expected a mapping from names to tensors")
    return {str(name): value for name, value in state.items()}


def key_faults(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every key that is missing, superfluous or of another shape, each in a few words."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} has no place" for name in found if name not in expected]
    faults += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return faults


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state_dict."""
    return {name: tuple(value.shape) for name, value in state.items()}


def fill(module: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a module made on the meta device these values, as copies of `dtype`.

    Raises:
        ValueError: a value is not finite.
    """
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"the values for {name} are not finite")
    owned = {
        name: value.detach().to(
            "cpu", dtype if value.is_floating_point() else value.dtype, copy=True
        )
        for name, value in values.items()
    }
    module.load_state_dict(owned, assign=True)
