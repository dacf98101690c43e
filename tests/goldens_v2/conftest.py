"""The golden arrays of Google's MAGVIT-v2 port, and both ways to run the ops against them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from magvit_fast import _native

FOLDER = Path(__file__).parent.parent / "data" / "goldens" / "magvit_v2"

Arrays = dict[str, NDArray[Any]]


@functools.cache
def _load(name: str) -> Arrays:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Arrays]:
    """name of a file -> its arrays."""
    return _load


@pytest.fixture(params=["auto", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every golden holds for the native kernels where there are some, and for the references."""
    monkeypatch.setattr(_native, "_default_impl", request.param)
    return str(request.param)
