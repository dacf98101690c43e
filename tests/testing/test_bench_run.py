"""`make bench`: which run of a row is told, and what is told beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.run import asked, middle, render, rows

from magvit_fast import _native

needs_threads = pytest.mark.skipif(
    _native.missing_core(torch.device("cpu")) is not None
    or _native.core().build_info()["openmp"] == "none",
    reason="needs the compiled core, with OpenMP",
)


def _run(
    native: float,
    torch_ms: float,
    target: float | None = 3.0,
    latency: tuple[float, float] = (30, 32),
) -> list[dict[str, Any]]:
    def one(group: str, impl: str, ms: float, goal: float | None) -> dict[str, Any]:
        extra: dict[str, Any] = {"impl": impl, "core_latency_ns": list(latency)}
        if impl == "native" and goal:
            extra["target"] = goal
        return {
            "group": group, "fullname": f"{group}[{impl}]",
            "extra_info": extra, "stats": {"median": ms / 1e3},
        }  # fmt: skip

    return [
        one("conv", "native", native, target),
        one("conv", "torch", torch_ms, None),
        one("conv", "torch_channels_last", 2 * torch_ms, None),
        one("blur", "native", 1.0, None),
        one("blur", "torch", 2.0, None),
    ]


def test_a_row_is_told_by_the_run_of_its_median_ratio() -> None:
    first, slow, fast = _run(10, 40), _run(20, 40), _run(10, 60)
    table = middle([rows(first), rows(slow)[:1], rows(fast)[:1]])
    conv, blur = table
    assert (conv["native_ms"], conv["other_ms"], conv["other"]) == (10.0, 40.0, "torch")
    assert conv["ratios"] == [2.0, 4.0, 6.0]
    assert blur["ratios"] == [2.0]
    assert "| 4.00x | 2.00 to 6.00 | 3x | 32 |" in render(table, {"cpu": "x"})
    assert "| 2.00x |  |  | 32 |" in render(table, {"cpu": "x"})


def test_a_row_says_how_far_the_cores_were_apart() -> None:
    moved = rows(_run(1, 1, latency=(165.4, 29.6)))
    assert moved[0]["core_latency_ns"] == [165.4, 29.6]
    assert "| 3x | 165 to 30 |" in render(middle([moved]), {"cpu": "x"})


@needs_threads
def test_the_latency_of_cores_is_measured() -> None:
    assert 1.0 < _native.core().core_latency_ns() < 1e8


def test_of_two_runs_the_lower_ratio_is_told() -> None:
    assert middle([rows(_run(10, 40)), rows(_run(10, 60))])[0]["ratio"] == 4.0


def test_only_rows_with_a_target_are_measured_again() -> None:
    assert asked(_run(1, 1)) == ["conv[native]", "conv[torch]", "conv[torch_channels_last]"]
    assert asked(_run(1, 1, target=None)) == []
