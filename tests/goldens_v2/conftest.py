"""The golden arrays of Google's MAGVIT-v2 port, and every way to run the ops against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from tests.goldens import load_goldens

from magvit_fast import _native

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Arrays]:
    """name of a file -> its arrays."""
    return lambda name: load_goldens(f"magvit_v2/{name}")


@pytest.fixture(
    params=["auto", "reference", pytest.param("cuda", marks=pytest.mark.cuda)], autouse=True
)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every golden holds for the native kernels where there are some, for the references, on CUDA."""
    name = str(request.param)
    monkeypatch.setattr(_native, "_default_impl", "reference" if name == "reference" else "auto")
    if name == "cuda":  # float32 means float32, also where the reference stands in for a kernel
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return name


@pytest.fixture
def device(implementation: str) -> torch.device:
    """Where the test runs."""
    return torch.device("cuda" if implementation == "cuda" else "cpu")
