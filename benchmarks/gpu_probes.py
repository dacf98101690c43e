"""Questions that only a device answers, asked by `make gpu` before anything is measured.

Each probe is a process of its own that prints one JSON: a CUDA source of benchmarks/probes, compiled here with
nvcc, or a Python file. What is missing or fails is recorded, and the next probe runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_process import run_logged

ROOT = Path(__file__).resolve().parents[1]
PROBES = ROOT / "benchmarks" / "probes"
SECONDS = 40.0  # the most that one step of a probe takes

# By source: the compute capability that it needs, or None.
NEEDS: dict[str, tuple[int, int] | None] = {
    "cudnn_frontend.py": None,
    "l2_bandwidth.cu": None,
    "wgmma_shift.cu": (9, 0),
}


def compile_command(source: Path, binary: Path, capability: tuple[int, int]) -> list[str]:
    """nvcc for this device alone, with the flags that the cores' headers need."""
    arch = "90a" if capability == (9, 0) else "{}{}".format(*capability)
    return [
        shutil.which("nvcc") or "nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr",
        f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}",
        f'-DMF_BUILT_CUDA_ARCHS="{arch}"', str(source), "-o", str(binary),
    ]  # fmt: skip


def answer(log: str) -> dict[str, Any] | None:
    """The last line of a probe's output that is a JSON object."""
    for line in reversed(log.splitlines()):
        if not line.startswith("{"):
            continue
        try:
            found: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            return None
        return found
    return None


def run_probe(source: Path, capability: tuple[int, int], deadline: float) -> dict[str, Any]:
    """Compile and run one probe: its status, and its answer or what it said instead."""

    def run(command: list[str]) -> dict[str, Any]:
        return run_logged(command, min(SECONDS, deadline - time.perf_counter()))

    command = [sys.executable, str(source)]
    if source.suffix == ".cu":
        binary = ROOT / "build" / "probes" / source.stem
        binary.parent.mkdir(parents=True, exist_ok=True)
        compiled = run(compile_command(source, binary, capability))
        if compiled["status"] != 0:
            return compiled
        command = [str(binary)]
    done = run(command)
    found = answer(done["log"])
    if found is None:
        return {**done, "status": done["status"] or 1}
    return {"status": done["status"], "seconds": done["seconds"], "answer": found}


def probes(capability: tuple[int, int], deadline: float) -> dict[str, Any]:
    """All probes that this device can answer; the stage's status is the worst of theirs."""
    answers: dict[str, Any] = {}
    for name, needed in NEEDS.items():
        if needed is not None and capability != needed:
            answers[name] = {"status": 0, "log": f"needs compute capability {needed}"}
            continue
        answers[name] = run_probe(PROBES / name, capability, deadline)
    return {"status": max(a["status"] for a in answers.values()), "probes": answers}


def lines(stage: dict[str, Any]) -> list[str]:
    """The answers for the table: one line a probe."""
    told = []
    for name, found in stage.get("probes", {}).items():
        text = json.dumps(found["answer"]) if "answer" in found else found["log"][-300:].strip()
        told.append(f"- {name}: {text}")
    return told
