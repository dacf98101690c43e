"""What every benchmark of `make bench` carries beside its times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from magvit_fast import _native


@pytest.fixture(autouse=True)
def _core_latency(benchmark: Any) -> Iterator[None]:
    """Nanoseconds of a cache line between two threads, before and after: a row of near or of far cores."""
    measure = _native.core().core_latency_ns
    before = measure()
    yield
    benchmark.extra_info["core_latency_ns"] = [before, measure()]
