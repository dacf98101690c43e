"""`make bench`: every CPU benchmark in one pytest-benchmark run, its JSON kept, one table of ratios printed.

Within a group (one op, shape, dtype and pass) each benchmark names what it measures in
`extra_info["impl"]`: "native" is ours, everything else is a way of doing the same in PyTorch or another
library. The ratio is the median of the best other way over the median of ours, and the table says which that
was; where the target names a library (`extra_info["target_against"]`) the ratio is to that one. The JSON has all.

    python -m benchmarks.run [--only PATTERN] [--out FILE.json]
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


def measure(only: str | None, raw: Path) -> None:
    command = [
        sys.executable, "-m", "pytest", str(HERE), "-q", "-m", "bench", "-o", "python_files=bench_*.py",
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
            "target": by_impl["native"]["extra_info"].get("target"),
        })  # fmt: skip
    return table


def render(table: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        " · ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "| work | native ms | other ms | which | ratio | asked |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for r in table:
        target = f"{r['target']:g}x" if r["target"] else ""
        lines.append(
            f"| {r['group']} | {r['native_ms']:.3f} | {r['other_ms']:.3f} | {r['other']} "
            f"| {r['ratio']:.2f}x | {target} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="pytest -k pattern")
    parser.add_argument(
        "--out", type=Path, help="where the JSON goes (default: benchmarks/results/)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        measure(args.only, raw)
        table = rows(json.loads(raw.read_text())["benchmarks"])
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
