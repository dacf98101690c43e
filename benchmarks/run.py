"""`make bench`: every CPU benchmark under pytest-benchmark, its JSON kept, one table of ratios printed.

Within a group (one op, shape, dtype and pass) each benchmark names what it measures in
`extra_info["impl"]`: "native" is ours, everything else is a way of doing the same in PyTorch or another
library. The ratio is the median of the best other way over the median of ours, and the table says which that
was; where the target names a library (`extra_info["target_against"]`) the ratio is to that one. The JSON has all.

A ratio is always of one run. Shared machines have slow spells, so rows of which a figure is asked are measured in more
runs: the row is then the run of the median ratio, and the table says how far the runs lie apart. A virtual machine
may also be moved between cores that share a cache and cores that do not: "core to core" is the time of a cache line
from one thread to the other around our own measurement (some 30 ns near, 150 far).

    python -m benchmarks.run [--only PATTERN] [--repeats 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

HERE = Path(__file__).resolve().parent


def measure(what: list[str], only: str | None) -> list[dict[str, Any]]:
    """One run of the files or tests `what`, as pytest-benchmark stores it."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        _run_pytest(what, only, raw)
        return list(json.loads(raw.read_text())["benchmarks"])


def _run_pytest(what: list[str], only: str | None, raw: Path) -> None:
    command = [
        sys.executable, "-m", "pytest", *what, "-q", "-m", "bench", "-o", "python_files=bench_*.py",
        "--benchmark-enable", "--benchmark-only", "--benchmark-disable-gc", "--benchmark-warmup=on",
        "--benchmark-warmup-iterations=1", "--benchmark-min-rounds=5", "--benchmark-max-time=0.4",
        "--benchmark-columns=median,iqr,rounds",
        f"--benchmark-json={raw}",
    ]  # fmt: skip
    if only:
        command += ["-k", only]
    status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
    if status != 0:
        raise SystemExit(status)


def rows(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a group: our median, the other median, the ratio, the target if the problem has one."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for b in benchmarks:
        groups[b["group"]][b["extra_info"]["impl"]] = b
    table = []
    for group, by_impl in groups.items():
        others = {k: v for k, v in by_impl.items() if k != "native"}
        if "native" not in by_impl or not others:
            continue
        # A target may name what it is measured against; else it is the best of the others.
        against = by_impl["native"]["extra_info"].get("target_against")
        best = against or min(others, key=lambda k: others[k]["stats"]["median"])
        ours, theirs = by_impl["native"]["stats"]["median"], others[best]["stats"]["median"]
        table.append({
            "group": group,
            "native_ms": ours * 1e3,
            "other": best,
            "other_ms": theirs * 1e3,
            "all_other_ms": {k: v["stats"]["median"] * 1e3 for k, v in others.items()},
            "ratio": theirs / ours,
            "core_latency_ns": by_impl["native"]["extra_info"]["core_latency_ns"],
            "target": by_impl["native"]["extra_info"].get("target"),
        })  # fmt: skip
    return table


def asked(benchmarks: list[dict[str, Any]]) -> list[str]:
    """The tests whose group has a target."""
    groups = {b["group"] for b in benchmarks if b["extra_info"].get("target")}
    return [b["fullname"] for b in benchmarks if b["group"] in groups]


def middle(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of every row of the first run, the run with the median ratio (the lower of two in the middle)."""
    table = []
    for row in runs[0]:
        same = sorted(
            (r for run in runs for r in run if r["group"] == row["group"]), key=lambda r: r["ratio"]
        )
        chosen = same[(len(same) - 1) // 2]
        table.append({**chosen, "ratios": [r["ratio"] for r in same]})
    return table


def render(table: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        " · ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "| work | native ms | other ms | which | ratio | of runs | asked | core to core ns |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for r in table:
        target = f"{r['target']:g}x" if r["target"] else ""
        several = len(r["ratios"]) > 1
        runs = f"{r['ratios'][0]:.2f} to {r['ratios'][-1]:.2f}" if several else ""
        lines.append(
            f"| {r['group']} | {r['native_ms']:.3f} | {r['other_ms']:.3f} | {r['other']} "
            f"| {r['ratio']:.2f}x | {runs} | {target} | {_near_or_far(r['core_latency_ns'])} |"
        )
    return "\n".join(lines)


def _near_or_far(latencies: list[float]) -> str:
    """Before and after the measurement, once where they agree."""
    before, after = (f"{ns:.0f}" for ns in latencies)
    apart = max(latencies) > 2 * min(latencies)
    return f"{before} to {after}" if apart else after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="pytest -k pattern")
    parser.add_argument(
        "--out", type=Path, help="where the JSON goes (default: benchmarks/results/)"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="further runs of the rows that have a target"
    )
    args = parser.parse_args()
    first = measure([str(HERE)], args.only)
    again = asked(first)
    further = [rows(measure(again, None)) for _ in range(args.repeats if again else 0)]
    table = middle([rows(first), *further])
    machine = describe()
    slug = re.sub(
        r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads".lower()
    ).strip("-")
    out = args.out or HERE / "results" / f"cpu-{slug}{'-partial' if args.only else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "rows": table}, indent=1) + "\n")
    text = render(table, machine)
    out.with_suffix(".md").write_text(text + "\n")
    print(text)
    print(f"\nkept in {out}")


if __name__ == "__main__":
    main()
