"""The shapes of an op, from problems/<op>.toml: benchmarks measure some, tests check some."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent / "problems"


def problems(op: str, use: str) -> list[dict[str, Any]]:
    """The problems of `op` that are marked for `use`, "bench" or "test"."""
    listed: list[dict[str, Any]] = tomllib.loads((FOLDER / f"{op}.toml").read_text())["problem"]
    return [p for p in listed if p.get(use)]
