"""A stage or a row of `make gpu` that hangs, dies or loses the device costs itself, not the rest."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu_process, gpu_session, gpu_worker
from benchmarks.gpu_row import Row

FOREVER = float("inf")


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_a_stage_says_is_kept() -> None:
    result = gpu_process.run_logged(_python("print('hello'); raise SystemExit(4)"), 60)
    assert result["status"] == 4
    assert result["log"] == "hello\n"
    assert gpu_process.run_logged(["/no/such/program"], 1)["status"] == 127
    log = gpu_process.kept("first" + "x" * 100_000 + "last")
    assert log.startswith("first")
    assert log.endswith("last")
    assert len(log) < 40_000


def test_a_stage_that_hangs_is_stopped_with_its_children() -> None:
    begin = time.perf_counter()
    result = gpu_process.run_logged(["sh", "-c", "sleep 600 & echo $!; wait"], 3)
    assert time.perf_counter() - begin < 300
    assert result["status"] == gpu_process.LATE
    child, *rest = result["log"].splitlines()
    assert rest == ["", "stopped after 3 s"]
    for _ in range(600):  # whoever adopts it may take a moment to collect it
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_lines_are_handed_on_and_a_quiet_process_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"old": 0}\n')
    lines: list[dict[str, Any]] = []
    write = f"out = open({str(path)!r}, 'a', buffering=1)\nout.write('{{\"a\": 1}}\\n{{\"b\"')\n"
    finish = write + "out.flush(); out.write(': 2}\\n'); out.close(); raise SystemExit(3)"
    assert gpu_process.follow(_python(finish), path, 60, 60, lines.append) == 3
    assert lines == [{"a": 1}, {"b": 2}]
    hang = write + "import time; time.sleep(600)"
    assert gpu_process.follow(_python(hang), path, 600, 1, lines.append) == gpu_process.LATE


def _rows() -> list[Row]:
    return [
        Row("plain", lambda: (), {}),
        Row("hopper", lambda: (), {}, sm90a=("gather",)),
        Row("last", lambda: (), {}),
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_that_loses_the_device_is_measured_again_without_its_kernels(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    asked: list[tuple[str, tuple[str, ...]]] = []
    lost = False

    def measure(row: Row, kernels: Sequence[str]) -> dict[str, Any]:
        nonlocal lost
        asked.append((row.name, tuple(kernels)))
        lost = row.name == "hopper" and bool(kernels)
        return {"row": row.name, "ways": {"ours": {"ms": 1.0}}}

    def run() -> int:
        return gpu_worker.work(_rows(), path, ["gather"], FOREVER, measure, lambda: not lost)

    assert run() == gpu_worker.LOST
    assert run() == 0
    assert asked == [
        ("plain", ("gather",)), ("hopper", ("gather",)), ("hopper", ()), ("last", ("gather",)),
    ]  # fmt: skip
    results = [line for line in _lines(path) if "row" in line]
    assert [result["row"] for result in results] == ["plain", "hopper", "last"]
    assert "error" in results[1]["ways"][gpu_session.SM90A]
    assert _lines(path)[-1] == {"left_out": []}


def test_a_row_that_ends_the_process_is_passed(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    begun = [{"begin": "plain"}, {"begin": "hopper"}, {"begin": "hopper"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in begun))

    def measure(row: Row, kernels: Sequence[str]) -> dict[str, Any]:
        raise RuntimeError(row.name)

    assert gpu_worker.work(_rows(), path, ["gather"], FOREVER, measure, lambda: True) == 0
    assert _lines(path)[3:] == [
        {"begin": "last"}, {"row": "last", "ways": {}, "error": "RuntimeError: last"},
        {"left_out": []},
    ]  # fmt: skip
    path.unlink()
    assert gpu_worker.work(_rows(), path, [], 0.0, measure, lambda: True) == 0
    assert _lines(path) == [{"left_out": ["plain", "hopper", "last"]}]


def test_the_session_goes_on_behind_a_row_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [  # what each process says, and how it ends
        ([{"begin": "a"}, {"row": "a", "ways": {}}, {"begin": "b"}], gpu_process.LATE),
        ([{"begin": "c"}, {"row": "c", "ways": {}}, {"left_out": ["d"]}], 0),
    ]

    def follow(command: list[str], path: Path, seconds: float, quiet: float, on_line: Any) -> int:
        assert command[command.index("--served") + 1 :] == ["gather"]
        lines, status = runs.pop(0)
        for line in lines:
            on_line(line)
        return status

    monkeypatch.setattr(gpu_process, "follow", follow)
    kept: list[dict[str, Any]] = []
    stage = gpu_session.bench(
        time.perf_counter() + 60, None, 0.1, ["gather"], tmp_path / "rows", kept.append
    )
    assert stage == {"status": 0, "ends": [gpu_process.LATE, 0], "left_out": ["d"]}
    assert [row["row"] for row in kept] == ["a", "c", "b"]
    assert "hung" in kept[2]["error"]


def test_a_worker_that_cannot_begin_is_started_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    kept: list[dict[str, Any]] = []
    until = time.perf_counter() + 600
    stage = gpu_session.bench(until, None, 0.1, [], tmp_path / "rows", kept.append)
    assert stage == {"status": 1, "ends": [1], "left_out": []}
    assert not kept


def test_the_tests_say_where_they_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_logged(command: list[str], seconds: float, env: dict[str, str]) -> dict[str, Any]:
        return {"command": command, "seconds": seconds}

    monkeypatch.setattr(gpu_process, "run_logged", run_logged)
    done = gpu_session.tests(time.perf_counter() + 1e6)
    assert done["seconds"] == gpu_session.TEST_SECONDS
    assert f"faulthandler_timeout={gpu_session.HANG_SECONDS}" in done["command"]
    assert gpu_session.HANG_SECONDS < gpu_session.SM90A_SECONDS
    assert [done["command"][at + 1] for at, word in enumerate(done["command"]) if word == "-W"] == [
        "default"
    ]


def test_tools_are_found_behind_those_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/first")
    gpu_session.find_tools()
    assert os.environ["PATH"].split(os.pathsep)[:2] == ["/first", str(Path(sys.executable).parent)]
