"""Measures the rows of the GPU session in a process of its own, so that one that hangs or dies costs itself alone.

    python3 -m benchmarks.gpu_worker FILE [--only PATTERN] [--seconds S] [--limit SECONDS] [--served KERNEL ...]

FILE gets a line of JSON before each row and one after it. Started again with the same file, the worker goes
on behind the row that ended it; if that row used kernels that are off by default, it is first measured without.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_rows, gpu_session
from benchmarks.gpu_row import Row

LOST = 3  # the exit status when the device's context is lost: only a new process gets another


def remaining(
    rows: Sequence[Row], lines: Sequence[dict[str, Any]], served: Sequence[str]
) -> Iterator[tuple[Row, Sequence[str]]]:
    """What the lines leave to measure: rows, each with the kernels that may serve."""
    begun = Counter(line["begin"] for line in lines if "begin" in line)
    done = {line["row"] for line in lines if "row" in line}
    for row in rows:
        if row.name in done or begun[row.name] > int(gpu_session.uses(row, served)):
            continue
        yield row, () if begun[row.name] else served


def work(
    rows: Sequence[Row], path: Path, served: Sequence[str], until: float,
    measure: Callable[[Row, Sequence[str]], dict[str, Any]], alive: Callable[[], bool],
) -> int:  # fmt: skip
    """Measure what the file leaves to measure until the time is up; the exit status."""
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    left_out = []
    with path.open("a") as out:

        def tell(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        for row, kernels in remaining(rows, before, served):
            if time.perf_counter() > until:
                left_out.append(row.name)
                continue
            tell({"begin": row.name})
            try:
                result = measure(row, kernels)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:500]
                result = {"row": row.name, "ways": {}, "error": text}
            lost = not alive()
            if gpu_session.uses(row, kernels) and lost:
                print(f"{row.name}: {result}", flush=True)
                return LOST  # without a result: begun again without these kernels
            if gpu_session.uses(row, served) and not kernels:
                result["ways"][gpu_session.SM90A] = {
                    "error": "hung, or ended the process", "informative": False,
                }  # fmt: skip
            tell(result)
            if lost:
                return LOST
        tell({"left_out": left_out})
    return 0


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device's context is lost: {error}", flush=True)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--limit", type=float, default=240.0, help="no row begins after so long")
    parser.add_argument("--served", nargs="*", default=[])
    args = parser.parse_args()
    until = time.perf_counter() + args.limit
    sys.path.insert(0, str(gpu_session.ROOT / "python"))
    gpu_rows.set_up()
    rows = [r for r in gpu_rows.all_rows() if not args.only or re.search(args.only, r.name)]

    def measure(row: Row, kernels: Sequence[str]) -> dict[str, Any]:
        return gpu_session.measure_row(row, args.seconds, kernels)

    return work(rows, args.file, args.served, until, measure, _alive)


if __name__ == "__main__":
    sys.exit(main())
