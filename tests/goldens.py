"""Golden arrays under tests/data/goldens, read once and held (their files are closed again)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent / "data" / "goldens"


@functools.cache
def load_goldens(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file, for example "magvit_v2/blur_pool"."""
    with np.load(ROOT / f"{name}.npz") as data:
        return dict(data)
