"""`make gpu`: on a machine with a GPU, build the cores, run the CUDA tests, run the GPU benchmarks.

Works with the machine's own Python, torch, cmake and nvcc, without network or pip. One JSON keeps
everything (in $OUT if that is set, else in benchmarks/results/); the table is printed last. A stage that
fails is recorded and the next one runs.

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
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_rows, gpu_timing

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "tests", "bench")
BUILD_SECONDS, TEST_SECONDS = 240, 150
KEPT_LOG = 6000  # characters of a stage's output that go into the JSON


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


def run_logged(
    command: list[str], seconds: float, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a stage's command: its status, its time and the end of what it said."""
    print("$", " ".join(command), flush=True)
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=seconds, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        out = late.stdout or ""
        text = out.decode(errors="replace") if isinstance(out, bytes) else out
        status, text = 124, f"{text}\nstopped after {seconds:.0f} s"
    except OSError as error:
        status, text = 127, str(error)
    spent = time.perf_counter() - begin
    print(text[-3000:], flush=True)
    return {
        "command": command,
        "status": status,
        "seconds": round(spent, 1),
        "log": text[-KEPT_LOG:],
    }


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
        result["steps"].append(run_logged(command, left))
        result["status"] = result["steps"][-1]["status"]
        if result["status"] != 0:
            break
    return result


def tests(deadline: float) -> dict[str, Any]:
    """pytest -m cuda, in a process of its own: a crash there ends nothing here."""
    missing = [
        m for m in ("pytest", "pytest_benchmark", "hypothesis") if not importlib.util.find_spec(m)
    ]
    if missing:
        return {"status": 127, "log": f"not installed here: {', '.join(missing)}"}
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--maxfail=40", "--tb=short",
               "--continue-on-collection-errors", "-p", "no:cacheprovider"]  # fmt: skip
    return run_logged(command, min(TEST_SECONDS, deadline - time.perf_counter()), env)


def _difference(row: gpu_rows.Row, inputs: tuple[Any, ...]) -> float | None:
    """The largest difference between our result and that of the row's first way, relative to its largest value."""
    if row.ours is None or not row.compare or not row.ways:
        return None
    first = lambda out: out[0] if isinstance(out, (tuple, list)) else out  # noqa: E731
    actual = first(row.ours(*inputs)).detach().double()
    expected = first(next(iter(row.ways.values()))(*inputs)).detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _measure_way(
    call: Any, sets: list[tuple[Any, ...]], seconds: float, informative: bool
) -> dict[str, Any]:
    try:
        timing = gpu_timing.measure(call, sets, seconds=seconds)
    except Exception as error:  # recorded, not fatal: the measurement goes on with the next way
        torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {error}"[:500], "informative": informative}
    return {**vars(timing), "informative": informative}


def measure_row(row: gpu_rows.Row, seconds: float) -> dict[str, Any]:
    """Every way of a row; a way that fails is recorded and the others are measured."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    result: dict[str, Any] = {"row": row.name, "flops": row.flops, "bytes": row.bytes, "ways": {}}
    sets = gpu_timing.rotation(row.make, l2)
    ways = {**({"ours": row.ours} if row.ours else {}), **row.ways, **row.informative}
    for name, call in ways.items():
        result["ways"][name] = _measure_way(call, sets, seconds, name in row.informative)
    try:
        result["difference"] = _difference(row, sets[0])
    except Exception as error:
        result["difference_error"] = f"{type(error).__name__}: {error}"[:500]
    return result


def bench(
    deadline: float, only: str | None, seconds: float, rows_out: list[dict[str, Any]]
) -> dict[str, Any]:
    """All rows until the deadline. Results go to rows_out as they come, so that none is lost."""
    sys.path.insert(0, str(ROOT / "python"))
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    left_out = []
    for row in gpu_rows.all_rows():
        if only and not re.search(only, row.name):
            continue
        if time.perf_counter() > deadline:
            left_out.append(row.name)
            continue
        try:
            result = measure_row(row, seconds)
        except Exception as error:
            result = {
                "row": row.name,
                "ways": {},
                "error": f"{type(error).__name__}: {error}"[:500],
            }
        rows_out.append(result)
        print(_table_line(result), flush=True)
        torch.cuda.empty_cache()
    return {"status": 0, "left_out": left_out}


def _best(result: dict[str, Any]) -> tuple[str, float] | None:
    times = {
        name: way["ms"]
        for name, way in result["ways"].items()
        if name != "ours" and "ms" in way and not way["informative"]
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def _table_line(result: dict[str, Any]) -> str:
    ours, best = result["ways"].get("ours", {}), _best(result)
    own = ours.get("ms")
    shown = own if own is not None else best[1] if best else None
    rate = ""
    if shown and result.get("flops"):
        rate = f"{result['flops'] / shown / 1e9:.0f} TFLOP/s"
    elif shown and result.get("bytes"):
        rate = f"{result['bytes'] / shown / 1e9:.2f} TB/s"
    difference = result.get("difference")
    cells = [
        result["row"],
        f"{own:.4f}" if own is not None else ("error" if "error" in ours else "-"),
        f"{best[1]:.4f}" if best else "-",
        best[0] if best else result.get("error", "-"),
        f"{best[1] / own:.2f}x" if own and best else "",
        rate,
        f"{difference:.1e}" if difference is not None else "",
    ]
    return "| " + " | ".join(cells) + " |"


def table(report: dict[str, Any]) -> str:
    facts = " · ".join(f"{k} {v}" for k, v in report["machine"].items() if v is not None)
    stages = " · ".join(
        f"{name}: {'ok' if stage['status'] == 0 else 'FAILED (' + str(stage['status']) + ')'}"
        for name, stage in report["stages"].items()
    )
    lines = [
        facts, stages, "",
        "| work | ours ms | PyTorch ms | PyTorch's best way | ratio | rate | difference |",
        "|---|---:|---:|---|---:|---:|---:|",
        *(_table_line(result) for result in report["rows"]),
    ]  # fmt: skip
    left = report["stages"].get("bench", {}).get("left_out")
    if left:
        lines.append(f"\n{len(left)} rows left out, the time was up: {', '.join(left[:5])} ...")
    return "\n".join(lines)


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
    if args.dry_run:
        sys.path.insert(0, str(ROOT / "python"))
        rows = [r for r in gpu_rows.all_rows() if not args.only or re.search(args.only, r.name)]
        for row in rows:
            print(
                f"{row.name}: {', '.join([*(['ours'] if row.ours else []), *row.ways, *row.informative])}"
            )
        print(f"{len(rows)} rows")
        return 0
    if not torch.cuda.is_available():
        print(
            f"make gpu: no CUDA device (torch {torch.__version__}, torch.cuda.is_available() is False); "
            "`python3 -m benchmarks.gpu_session --dry-run` lists what would run",
            file=sys.stderr,
        )
        return 2
    deadline = time.perf_counter() + args.minutes * 60 - 10
    report: dict[str, Any] = {"machine": machine(), "only": args.only, "stages": {}, "rows": []}
    work = {
        "build": lambda: build(deadline),
        "tests": lambda: tests(deadline),
        "bench": lambda: bench(deadline, args.only, args.seconds, report["rows"]),
    }
    for name in STAGES:
        if name in args.skip:
            continue
        try:
            report["stages"][name] = work[name]()
        except Exception:
            report["stages"][name] = {"status": 1, "log": traceback.format_exc()[-KEPT_LOG:]}
            print(report["stages"][name]["log"], flush=True)
        path = _output_path(report)  # written after every stage: a crash keeps what there is
        path.write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\nkept in {path}\n\n{text}")
    return 0 if all(stage["status"] == 0 for stage in report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
