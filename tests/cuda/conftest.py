"""Each test of a CUDA kernel runs twice: emulated on the CPU, and (marked cuda) on a device."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from tests.cuda import emulation

from magvit_fast import _native


@pytest.fixture(scope="session")
def emulated_core() -> ModuleType:
    """`_core_cuda` compiled as C++ on the emulator."""
    obstacle = emulation.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    return emulation.load()


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.cuda)])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where a test's tensors go so that impl="native" runs the CUDA kernels on them."""
    if request.param == "device":
        yield torch.device("cuda")
        return
    core = request.getfixturevalue("emulated_core")
    monkeypatch.setattr(_native, "launcher", lambda device: (core, 0, 0))
    monkeypatch.setattr(_native, "missing_core", lambda device: None)
    monkeypatch.setattr(_native, "joins_passes", lambda device: True)
    yield torch.device("cpu")
