"""`make gpu`: on a machine with a GPU, build the cores, run the CUDA tests, run the GPU benchmarks.

Works with the machine's own Python, torch, cmake and nvcc, without network or pip. One JSON keeps
everything (in $OUT if that is set, else in benchmarks/results/); the table is printed last. A stage that
fails is recorded and the next one runs.

torch.compile's ways come last, as compiling takes long: a row of which the compilation exceeds its own limit is "not
measured", with the seconds that it was given (--skip compiled leaves them out).

    python3 -m benchmarks.gpu_session [--only PATTERN] [--dry-run] [--minutes 8] [--skip build tests]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_compiled, gpu_probes, gpu_process, gpu_rows, gpu_timing
from benchmarks.gpu_row import SM90A, Row
from benchmarks.gpu_table import table, table_line

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "probes", "tests", "sm90a", "bench", "compiled")
BUILD_SECONDS, TEST_SECONDS, SM90A_SECONDS = 240, 120, 75  # the last one of a kernel
ROW_SECONDS, LATE_SECONDS = 100, 30  # of one row; that the last one may take beyond the deadline
COMPILED_SECONDS, COMPILED_SHARE = 150, 0.4  # at most, and of what bench and compiled have together
HANG_SECONDS = 30  # after so long a test says where it is
SM90A_TESTS = {  # of the kernels that are off by default
    "gather": "tests/cuda/test_causal_conv3d_sm90.py",
    "fused": "tests/cuda/test_conv_fused.py",
    "weight_grad": "tests/cuda/test_causal_conv3d_sm90_weight.py",
}


def machine() -> dict[str, Any]:
    """What a figure needs beside it."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "cpu_cores": os.cpu_count(),
        "nvcc": _first_line(["nvcc", "--version"], "release"),
        "driver": _first_line(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        ),
        "commit": _first_line(["git", "rev-parse", "--short", "HEAD"]),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "l2_mib": device.L2_cache_size / 2**20,
        }
    return facts


def _first_line(command: list[str], containing: str = "") -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if containing in line]
    return lines[0] if lines and done.returncode == 0 else None


def find_tools() -> None:
    """cmake and ninja beside this Python, nvcc where its installer puts it: after what PATH has."""
    for folder in (Path(sys.executable).parent, Path("/usr/local/cuda/bin")):
        os.environ["PATH"] += os.pathsep + str(folder)


def build(deadline: float) -> dict[str, Any]:
    """Configure and build in build/gpu, for this machine's architecture alone; cores beside the sources."""
    major, minor = torch.cuda.get_device_capability()
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    ninja = shutil.which("ninja") is not None
    configure = [
        shutil.which("cmake") or "cmake", "-S", ".", "-B", "build/gpu",
        "-G", "Ninja" if ninja else "Unix Makefiles",
        "-DCMAKE_BUILD_TYPE=Release", "-DMAGVIT_FAST_INPLACE=ON", "-DMAGVIT_FAST_CUDA=ON",
        f"-DMAGVIT_FAST_CUDA_ARCHS={arch}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    steps = [configure, [configure[0], "--build", "build/gpu", "-j", str(os.cpu_count() or 2)]]
    result: dict[str, Any] = {"status": 0, "steps": []}
    for command in steps:
        left = min(BUILD_SECONDS, deadline - time.perf_counter())
        result["steps"].append(gpu_process.run_logged(command, left))
        result["status"] = result["steps"][-1]["status"]
        if result["status"] != 0:
            break
    return result


def _pytest(seconds: float, *arguments: str) -> dict[str, Any]:
    """pytest -m cuda, in a process of its own: a crash there ends nothing here."""
    missing = [
        m for m in ("pytest", "pytest_benchmark", "hypothesis") if not importlib.util.find_spec(m)
    ]
    if missing:
        return {"status": 127, "log": f"not installed here: {', '.join(missing)}"}
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "4"}
    # Most of the time is the host's; and a process that loses its device takes few tests with it.
    several = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    # -v: the name of a test is told before it runs; warnings of another torch are no failures.
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "--maxfail=40", "--tb=short",
               "-W", "default", "-o", f"faulthandler_timeout={HANG_SECONDS}",
               "--continue-on-collection-errors", "-p", "no:cacheprovider", *several,
               *arguments]  # fmt: skip
    return gpu_process.run_logged(command, seconds, env)


def tests(deadline: float) -> dict[str, Any]:
    """Every test that needs a device, but those of kernels that are off by default."""
    left = min(TEST_SECONDS, deadline - time.perf_counter())
    return _pytest(left, *(f"--ignore={path}" for path in SM90A_TESTS.values()))


def sm90a(deadline: float) -> dict[str, Any]:
    """The kernels for compute capability 9.0 alone, each in a process of its own, as one that never ran may hang.

    Those that pass are `served`: measured.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        return {"status": 0, "served": [], "log": "not a device of compute capability 9.0"}
    kernels = {}
    for name, path in SM90A_TESTS.items():
        kernels[name] = _pytest(min(SM90A_SECONDS, deadline - time.perf_counter()), path)
    served = [name for name, result in kernels.items() if result["status"] == 0]
    status = max(result["status"] for result in kernels.values())
    return {"status": status, "served": served, "kernels": kernels}


def _first(result: Any) -> torch.Tensor:
    value: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return value.detach().double()


def _difference(row: Row, ours: Any, inputs: tuple[Any, ...]) -> float | None:
    """The largest difference between our result and that of the row's first way, relative to its largest value."""
    if ours is None or not row.compare or not row.ways:
        return None
    actual = _first(ours(*inputs))
    expected = _first(next(iter(row.ways.values()))(*inputs))
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _with_sm90a(call: Any) -> Any:
    from magvit_fast import _native

    def run(*inputs: Any) -> Any:
        with _native.sm90a_kernels():
            return call(*inputs)

    return run


def _measure_way(
    row: Row, call: Any, sets: list[tuple[Any, ...]], seconds: float, informative: bool
) -> dict[str, Any]:
    try:
        timing = gpu_timing.measure(call, sets, seconds=seconds, graph=row.graph)
    except Exception as error:  # recorded, not fatal: the measurement goes on with the next way
        torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {error}"[:500], "informative": informative}
    return {**vars(timing), "informative": informative}


def uses(row: Row, served: Sequence[str]) -> bool:
    """Whether a row is measured with kernels that are off by default."""
    return bool(row.sm90a) and set(row.sm90a) <= set(served)


def measure_row(row: Row, seconds: float, served: Sequence[str] = ()) -> dict[str, Any]:
    """Every way of a row; a way that fails is recorded and the others are measured."""
    result: dict[str, Any] = {"row": row.name, "flops": row.flops, "bytes": row.bytes,
                              "items": row.items, "item": row.item, "ways": {}}  # fmt: skip
    sets = gpu_timing.rotation(row.make, gpu_timing.cold_bytes(row.rotate))
    own = {"ours": row.ours} if row.ours else {}
    if uses(row, served):
        own[SM90A] = _with_sm90a(row.ours)
    for name, call in {**own, **row.ways, **row.informative}.items():
        result["ways"][name] = _measure_way(row, call, sets, seconds, name in row.informative)
    for name, call in own.items():
        way = result["ways"][name]
        try:
            way["difference"] = _difference(row, call, sets[0])
        except Exception as error:
            way["difference_error"] = f"{type(error).__name__}: {error}"[:500]
    return result


def bench(
    deadline: float, only: str | None, seconds: float, served: Sequence[str], path: Path,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """All rows until the deadline, in a process that begins again behind a row that hangs or ends it."""
    lines: list[dict[str, Any]] = []
    ends: list[int] = []

    def heard(line: dict[str, Any]) -> None:
        lines.append(line)
        if "row" in line:
            keep(line)
            print(table_line(line), flush=True)

    path.unlink(missing_ok=True)
    while not ends or ends[-1] != 0:
        known, left = len(lines), deadline - time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.gpu_worker", str(path), f"--seconds={seconds}",
                   f"--limit={left}", *([f"--only={only}"] if only else []),
                   "--served", *served]  # fmt: skip
        ends.append(gpu_process.follow(command, path, left + LATE_SECONDS, ROW_SECONDS, heard))
        if len(lines) == known:  # not one row was begun: neither would the next process
            break
    done = {line["row"] for line in lines if "row" in line}
    for name in dict.fromkeys(line["begin"] for line in lines if "begin" in line):
        if name not in done:
            keep({"row": name, "ways": {}, "error": "hung, or ended the process"})
    left_out = next((line["left_out"] for line in lines if "left_out" in line), [])
    return {"status": ends[-1], "ends": ends, "left_out": left_out}


def compiled(
    deadline: float, only: str | None, seconds: float, rows_out: list[dict[str, Any]]
) -> dict[str, Any]:
    """torch.compile's way of the rows that have one, added to what bench found of them."""
    wanted = [r for r in gpu_rows.all_rows() if not only or re.search(only, r.name)]
    found = gpu_compiled.measure(gpu_rows.compiled_rows(wanted), deadline, seconds)
    results = {result["row"]: result for result in rows_out}
    for row in wanted:
        if row.name not in found:
            continue
        if row.name not in results:  # bench did not come to it
            results[row.name] = {"row": row.name, "flops": row.flops, "bytes": row.bytes,
                                 "items": row.items, "item": row.item, "ways": {}}  # fmt: skip
            rows_out.append(results[row.name])
        way = {**found[row.name], "informative": False}
        results[row.name]["ways"][gpu_compiled.WAY] = way
    measured = sum("ms" in way for way in found.values())
    return {"status": 0, "measured": measured, "asked": len(found)}


def bench_deadline(now: float, deadline: float, skipped: list[str]) -> float:
    """When bench must leave the rest of the time to the compiled ways."""
    if "compiled" in skipped:
        return deadline
    return deadline - min(COMPILED_SECONDS, COMPILED_SHARE * (deadline - now))


def _output_path(report: dict[str, Any]) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", str(report["machine"].get("gpu", "gpu")).lower()).strip("-")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"gpu-{slug}{'-partial' if report['only'] else ''}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="regular expression on row names")
    parser.add_argument("--dry-run", action="store_true", help="list the rows; needs no GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together")
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="of measuring one way of one row"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=STAGES, help="stages to leave out")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "python"))  # the sources and, once built, their cores
    if args.dry_run:
        rows = [r for r in gpu_rows.all_rows() if not args.only or re.search(args.only, r.name)]
        for row in rows:
            own = [*(["ours"] if row.ours else []), *([SM90A] if row.sm90a else [])]
            late = [gpu_compiled.WAY] if row.compiled else []
            print(f"{row.name}: {', '.join([*own, *row.ways, *late, *row.informative])}")
        print(f"{len(rows)} rows")
        return 0
    if not torch.cuda.is_available():
        print(
            f"make gpu: no CUDA device (torch {torch.__version__}, torch.cuda.is_available() is False); "
            "`python3 -m benchmarks.gpu_session --dry-run` lists what would run",
            file=sys.stderr,
        )
        return 2
    find_tools()
    deadline = time.perf_counter() + args.minutes * 60 - 10
    report: dict[str, Any] = {"machine": machine(), "only": args.only, "stages": {}, "rows": []}
    path = _output_path(report)

    def save() -> None:
        path.write_text(json.dumps(report, indent=1) + "\n")

    def keep(result: dict[str, Any]) -> None:
        report["rows"].append(result)
        save()

    work = {
        "build": lambda: build(deadline),
        "probes": lambda: gpu_probes.probes(torch.cuda.get_device_capability(), deadline),
        "tests": lambda: tests(deadline),
        "sm90a": lambda: sm90a(deadline),
        "bench": lambda: bench(
            bench_deadline(time.perf_counter(), deadline, args.skip),
            args.only,
            args.seconds,
            report["stages"].get("sm90a", {}).get("served", []),
            path.with_name("gpu-rows.jsonl"),
            keep,
        ),
        "compiled": lambda: compiled(deadline, args.only, args.seconds, report["rows"]),
    }
    for name in STAGES:
        if name in args.skip:
            continue
        try:
            report["stages"][name] = work[name]()
        except Exception:
            report["stages"][name] = {"status": 1, "log": traceback.format_exc()}
            print(report["stages"][name]["log"], flush=True)
        save()  # after every stage and row: whatever ends this keeps what there is
    text = table(report)
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\nkept in {path}\n\n{text}")
    return 0 if all(stage["status"] == 0 for stage in report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
