"""Child processes of the GPU session: what hangs or dies there ends nothing here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT_HEAD, KEPT_TAIL = 12000, 24000  # characters of a stage's output that are kept
LATE = 124  # the status of what was stopped


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    # A group of its own, so that its children (ninja's compilers, tests' subprocesses) end with it;
    # no session of its own, so that whatever ends ours ends it.
    group = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    return subprocess.Popen(command, cwd=ROOT, text=True, **group, **options)


def stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kept(text: str) -> str:
    """Beginning and end of an output: the first failure is told early, the last one late."""
    if len(text) <= KEPT_HEAD + KEPT_TAIL:
        return text
    left_out = len(text) - KEPT_HEAD - KEPT_TAIL
    return f"{text[:KEPT_HEAD]}\n... {left_out} characters ...\n{text[-KEPT_TAIL:]}"


def run_logged(
    command: list[str], seconds: float, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a stage's command: its status, its time and what it said."""
    print("$", " ".join(command), flush=True)
    begin = time.perf_counter()
    try:
        process = start(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        status, text = 127, str(error)
    else:
        try:
            text, _ = process.communicate(timeout=max(seconds, 0))
            status = process.returncode
        except subprocess.TimeoutExpired:
            stop(process)
            text = f"{process.communicate()[0]}\nstopped after {seconds:.0f} s"
            status = LATE
        except BaseException:
            stop(process)
            raise
    spent = time.perf_counter() - begin
    print(text[-3000:], flush=True)
    return {"command": command, "status": status, "seconds": round(spent, 1), "log": kept(text)}


def follow(
    command: list[str], path: Path, seconds: float, quiet: float,
    on_line: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    """Run a command that appends JSON lines to a file; every new line is handed on.

    It is stopped after `seconds`, or when no line came for `quiet` seconds; its status is then LATE.
    """
    path.touch()
    process = start(command)
    until = last = time.perf_counter()
    until += seconds
    try:
        with path.open() as lines:
            lines.seek(0, os.SEEK_END)
            part = ""
            while True:
                status = process.poll()  # before the reading: what an ended process wrote is read
                while text := lines.readline():
                    part += text
                    if part.endswith("\n"):
                        on_line(json.loads(part))
                        part, last = "", time.perf_counter()
                if status is not None:
                    return status
                now = time.perf_counter()
                if now > until or now - last > quiet:
                    return LATE
                time.sleep(0.05)
    finally:
        stop(process)
