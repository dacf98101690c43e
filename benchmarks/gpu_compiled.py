"""PyTorch's ways under torch.compile(max-autotune), in the GPU session: another process compiles and measures them.

Compiling takes from seconds to minutes, and nothing inside a process can end it. So a worker process takes row after
row and says what it found; one that takes too long for a row is ended, the row is "not measured", and a new worker
goes on with the next. CUDA graphs are ours (gpu_timing.py), as for every other way; hence the mode without
torch.compile's own.

    python3 -m benchmarks.gpu_compiled SECONDS ROW...     (the worker)
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_process
from benchmarks.gpu_row import Row

ROOT = Path(__file__).resolve().parents[1]
WAY = "torch.compile, max-autotune"
START_SECONDS = 30.0  # that a worker may take before its first row: imports, the device
BEGIN, DONE = "compiled-row-begin ", "compiled-row-done "  # what the worker's lines start with


def worker_command(names: Sequence[str], seconds: float) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_compiled", str(seconds), *names]


class Worker:
    """A worker process and the lines that it has said."""

    def __init__(self, command: list[str]) -> None:
        self._process = gpu_process.start(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next_line(self, prefix: str, seconds: float) -> str | None:
        """What follows the prefix on the next line that has it; None at the worker's end.

        Raises:
            TimeoutError: no such line within `seconds`.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(until - time.monotonic(), 0.0))
            except queue.Empty:
                raise TimeoutError from None
            if line is None or line.startswith(prefix):
                return None if line is None else line.removeprefix(prefix).rstrip("\n")

    def end(self) -> None:
        """It and the helpers that torch.compile has started."""
        gpu_process.stop(self._process)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def measure(
    rows: Sequence[Row], deadline: float, seconds: float, command: Any = worker_command
) -> dict[str, dict[str, Any]]:
    """What the compiled way of every row took, or {"not_measured": why}, by the row's name.

    deadline: of time.perf_counter(); seconds: of measuring one row, once it is compiled.
    """
    found: dict[str, dict[str, Any]] = {}
    left = list(rows)
    while left:
        if deadline <= time.perf_counter():
            found |= {row.name: {"not_measured": "the time was up"} for row in left}
            break
        worker = Worker(command([row.name for row in left], seconds))
        try:
            left = _serve(worker, left, deadline, found)
        finally:
            worker.end()
    return found


def _serve(
    worker: Worker, rows: list[Row], deadline: float, found: dict[str, dict[str, Any]]
) -> list[Row]:
    """Take the worker's results until its end; the rows that it has not come to."""
    limit = START_SECONDS
    for index, row in enumerate(rows):
        start = time.perf_counter()
        try:
            if worker.next_line(BEGIN, min(limit, deadline - start)) is None:
                raise EOFError
            start = time.perf_counter()
            text = worker.next_line(DONE, min(row.compile_seconds, deadline - start))
            if text is None:
                raise EOFError
            found[row.name] = json.loads(text)
        except TimeoutError:
            why = f"{time.perf_counter() - start:.0f} s"
            found[row.name] = {"not_measured": why}
            return rows[index + 1 :]
        except EOFError:
            found[row.name] = {"not_measured": "its process ended"}
            return rows[index + 1 :]
        print(f"compiled: {row.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return []


def work(rows: Sequence[Row], seconds: float) -> None:
    """The worker: compile and measure every row, one line before and one after each."""
    import torch

    from benchmarks import gpu_timing

    compiler = lambda call: torch.compile(call, mode="max-autotune-no-cudagraphs")  # noqa: E731
    for row in rows:
        print(BEGIN + row.name, flush=True)
        assert row.compiled is not None
        result: dict[str, Any]
        try:
            torch._dynamo.reset()
            sets = gpu_timing.rotation(row.make, gpu_timing.cold_bytes(row.rotate))
            timing = gpu_timing.measure(
                row.compiled(compiler), sets, seconds=seconds, graph=row.graph
            )
            result = vars(timing)
        except Exception as error:  # recorded, not fatal: the next row is another one's work
            result = {"not_measured": f"{type(error).__name__}: {error}"[:500]}
        print(DONE + json.dumps(result), flush=True)


def main() -> None:
    sys.path.insert(0, str(ROOT / "python"))
    from benchmarks import gpu_rows

    gpu_rows.set_up()
    by_name = {row.name: row for row in gpu_rows.all_rows()}
    work([by_name[name] for name in sys.argv[2:]], float(sys.argv[1]))


if __name__ == "__main__":
    main()
