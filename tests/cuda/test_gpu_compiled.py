"""torch.compile's ways in `make gpu`: what is compiled does the row's work; a slow compilation ends with its row."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import gpu_compiled, gpu_models, gpu_rows, gpu_session, gpu_table
from benchmarks.gpu_row import Row

# A worker that stands for torch: "slow" rows hang, "dead" ones end the process, "bad" ones fail.
WORKER = """
import json, sys, time
for name in sys.argv[1:]:
    print("noise of a compiler", flush=True)
    print("compiled-row-begin " + name, flush=True)
    if name == "slow":
        time.sleep(60)
    if name == "dead":
        sys.exit(3)
    found = {"not_measured": "RuntimeError: no"} if name == "bad" else {"ms": 2.0}
    print("compiled-row-done " + json.dumps(found), flush=True)
"""


def _row(name: str, compile_seconds: float = 20.0) -> Row:
    return Row(name, lambda: (), {}, compiled=lambda compiler: compiler(abs),
               compile_seconds=compile_seconds)  # fmt: skip


def _command(names: list[str], seconds: float) -> list[str]:
    return [sys.executable, "-S", "-c", WORKER, *names]


def test_a_slow_compilation_is_ended_and_the_next_row_is_measured() -> None:
    rows = [_row("one"), _row("slow", 0.5), _row("dead"), _row("bad"), _row("last")]
    begin = time.perf_counter()
    found = gpu_compiled.measure(rows, begin + 40, 0.1, _command)
    assert time.perf_counter() - begin < 30
    assert found["one"] == found["last"] == {"ms": 2.0}
    assert found["slow"]["not_measured"].endswith(" s")
    assert found["dead"] == {"not_measured": "its process ended"}
    assert found["bad"] == {"not_measured": "RuntimeError: no"}


def test_rows_after_the_deadline_are_not_measured() -> None:
    begin = time.perf_counter()
    found = gpu_compiled.measure([_row("slow"), _row("one")], begin + 1.5, 0.1, _command)
    assert time.perf_counter() - begin < 15
    assert found["one"] == {"not_measured": "the time was up"}
    assert "not_measured" in found["slow"]


def test_compiled_ways_join_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_row("one"), _row("slow"), _row("unseen")]
    found = {"one": {"ms": 0.5}, "slow": {"not_measured": "30 s"}, "unseen": {"ms": 1.0}}
    monkeypatch.setattr(gpu_rows, "all_rows", lambda: rows)
    monkeypatch.setattr(gpu_rows, "compiled_rows", lambda rows: rows)
    monkeypatch.setattr(gpu_compiled, "measure", lambda *rest: found)
    kept: list[dict[str, Any]] = [
        {"row": name, "ways": {"eager": {"ms": 1.0, "informative": False}}}
        for name in ("one", "slow")
    ]
    stage = gpu_session.compiled(0.0, None, 0.1, kept)
    assert stage == {"status": 0, "measured": 2, "asked": 3}
    lines = [gpu_table.table_line(result) for result in kept]
    assert lines[0].startswith(f"| one | 0.5000 | {gpu_compiled.WAY} |")
    assert lines[1].startswith("| slow | 1.0000 | eager (torch.compile not measured: 30 s) |")
    assert lines[2].startswith(f"| unseen | 1.0000 | {gpu_compiled.WAY} |")


def test_bench_leaves_time_to_the_compiled_ways() -> None:
    assert gpu_session.bench_deadline(100.0, 200.0, ["compiled"]) == 200.0
    assert gpu_session.bench_deadline(100.0, 200.0, []) == 160.0
    assert gpu_session.bench_deadline(0.0, 1e4, []) == 1e4 - gpu_session.COMPILED_SECONDS


def test_the_asked_rows_are_compiled_first() -> None:
    rows = gpu_rows.compiled_rows(gpu_rows.all_rows())
    names = [row.name for row in rows]
    assert names[0] == "lfq training step n10240 d18"
    kinds = ("lfq", "confidence_remask", "factorized_embedding", "group_norm_silu", "causal_conv3d",
             "model: magvit-v2-base encode", "model: magvit-v2-base decode",
             "model: magvit-v2-base training step")  # fmt: skip
    for kind in kinds:
        assert any(name.startswith(kind) for name in names), kind


def _traced(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Callable[..., Any]]:
    """A compiler that only notes what it was given: what runs is then the same work."""
    asked: list[Any] = []

    def compiler(call: Callable[..., Any]) -> Callable[..., Any]:
        asked.append(call)
        return call

    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")
    return asked, compiler


def test_what_is_compiled_does_the_work_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, compiler = _traced(monkeypatch)
    for row in (*gpu_rows._lfq_rows((1,), (1, 2, 8)), *gpu_rows._embedding_rows(1)):
        if row.compiled is None:
            continue
        inputs = row.make()
        asked.clear()
        actual = gpu_session._first(row.compiled(compiler)(*inputs))
        assert asked, row.name
        expected = gpu_session._first(next(iter(row.ways.values()))(*inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3, msg=row.name)


def test_models_are_compiled_where_their_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, compiler = _traced(monkeypatch)
    rows = [
        *gpu_models.tokenizer_rows("cpu", "magvit-v2-demo", 1, 1, frames=5, size=16),
        gpu_models.generation_row("cpu", "magvit-v2-demo", "magvit-v2-demo", batch=1, steps=1),
    ]
    for row in rows:
        inputs = row.make()
        asked.clear()
        assert row.compiled is not None
        result = row.compiled(compiler)(*inputs)
        assert len(asked) == 1, row.name
        assert bool(result.isfinite().all()), row.name
