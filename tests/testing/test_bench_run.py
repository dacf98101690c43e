"""`make bench`: which run of a row is told."""

from __future__ import annotations

from typing import Any

from benchmarks.run import asked, middle, render, rows


def _run(native: float, torch_ms: float, target: float | None = 3.0) -> list[dict[str, Any]]:
    def one(group: str, impl: str, ms: float, goal: float | None) -> dict[str, Any]:
        extra = {"impl": impl} | ({"target": goal} if impl == "native" and goal else {})
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
    assert "| 4.00x | 2.00 to 6.00 | 3x |" in render(table, {"cpu": "x"})
    assert "| 2.00x |  |  |" in render(table, {"cpu": "x"})


def test_of_two_runs_the_lower_ratio_is_told() -> None:
    assert middle([rows(_run(10, 40)), rows(_run(10, 60))])[0]["ratio"] == 4.0


def test_only_rows_with_a_target_are_measured_again() -> None:
    assert asked(_run(1, 1)) == ["conv[native]", "conv[torch]", "conv[torch_channels_last]"]
    assert asked(_run(1, 1, target=None)) == []
