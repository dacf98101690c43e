"""Shared set-up: CUDA tests are skipped with a reason where there is no device; ISA levels as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from magvit_fast import _native, _recycled

# Deadlines measure the machine, not the code; a fixed derandomized profile keeps CI reproducible.
hypothesis.settings.register_profile("project", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(skip)


def _levels() -> list[str]:
    return list(_native.ISA_LEVELS[: _native.isa() + 1])


def sanitizers() -> str:
    """What the CPU core was built with (`make asan`)."""
    core = _native._cpu_core
    return "" if core is None else str(core.build_info().get("sanitizers", ""))


@pytest.fixture(params=_levels())
def isa_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    with _native.max_isa(request.param) as level:
        yield level


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The index of video files (data/index.py) is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _fresh_memory() -> Iterator[None]:
    """Where a sanitizer looks on, every workspace ends where its memory ends, and nothing is recycled."""
    with pytest.MonkeyPatch.context() as patch:
        if sanitizers():
            patch.setattr(_native, "_KEPT_BYTES", 0)
            patch.setattr(_recycled, "MOST_BYTES", 0)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
