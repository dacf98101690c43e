"""Finding the parameters of a model among named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor


def select(
    arrays: Mapping[str, NDArray[Any] | Tensor], prefix: str
) -> dict[str, NDArray[Any] | Tensor]:
    """The arrays under `prefix`/param/, param/`prefix`/ or `prefix`/, whichever there are first."""
    head = prefix.strip("/") + "/" if prefix.strip("/") else ""
    names = list(arrays)
    for start in (f"{head}param/", f"param/{head}", head):
        chosen = {name[len(start) :]: name for name in names if name.startswith(start)}
        if chosen:
            return {path: arrays[name] for path, name in chosen.items()}
    return {}


def few(names: list[str]) -> str:
    """At most four names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
