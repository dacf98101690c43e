"""From the jobs' results to a table of means and spreads, and to what agrees with the papers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from recipes.reproduce_small.plan import Claim, Comparison, Job, Plan

from magvit_fast.data.atomic import atomic_write_text
from magvit_fast.metrics import spread

# A pseudo-task of the metrics: the mean over the eight tasks that need no class.
MEAN = "MEAN8"
_EIGHT = (
    "frame_prediction",
    "frame_interpolation",
    "outpainting_central",
    "outpainting_vertical",
    "outpainting_horizontal",
    "outpainting_dynamic",
    "inpainting_central",
    "inpainting_dynamic",
)
_INTRODUCTION = (
    "Small models on small clips, trained for about a minute each: what the papers compare, not what "
    "they reach. Every number is mean ± standard deviation over seeds (over n, as the papers' are). "
    "The Frechet distance is over features of a small random network "
    "(recipes/reproduce_small/features.py): not the published FVD, and comparable within one table "
    "alone."
)

Result = dict[str, Any]


def value_of(result: Result, metric: str) -> float | None:
    """A metric of one job: a field of the result, or "part.field" of its scores."""
    part, _, name = metric.rpartition(".")
    if not part:
        value = result.get(name)
    elif part == MEAN:
        values = [result["scores"].get(task, {}).get(name) for task in _EIGHT]
        known = [v for v in values if v is not None]
        value = sum(known) / len(known) if len(known) == len(values) else None
    else:
        value = result.get("scores", {}).get(part, {}).get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def report_of(
    plan: Plan, jobs: Iterable[Job], result: Callable[[str], Result | None], clips: str
) -> dict[str, Any]:
    """Everything that the jobs have found so far, by comparison."""
    by_model: dict[str, list[Result]] = {}
    missing = []
    for job in jobs:
        found = result(job.name)
        if found is None:
            missing.append(job.name)
        else:
            by_model.setdefault(job.model, []).append(found)
    done = [r for found in by_model.values() for r in found]
    return {
        "machine": describe(),
        "plan": plan.name,
        "clips": f"{clips}; {plan.held_out} held-out ones measured",
        "seconds": round(sum(r["seconds"] for r in done), 1),
        "cpu_seconds": round(sum(r["cpu_seconds"] for r in done), 1),
        "jobs_done": len(done),
        "jobs_missing": missing,
        "comparisons": [
            compared
            for comparison in plan.comparisons.values()
            if (compared := _compared(comparison, by_model))["rows"]
        ],
    }


def _compared(comparison: Comparison, by_model: dict[str, list[Result]]) -> dict[str, Any]:
    rows = []
    for variant, model in comparison.variants.items():
        found = by_model.get(model, [])
        if not found:
            continue
        cells: dict[str, Any] = {}
        for metric in comparison.metrics:
            values = [v for r in found if (v := value_of(r, metric)) is not None]
            if values:
                mean, deviation = spread(values)
                cells[metric] = {"mean": mean, "std": deviation, "values": values}
        rows.append({
            "variant": variant,
            "seeds": sorted(r["seed"] for r in found),
            "parameters": found[0].get("parameters"),
            "steps": found[0].get("steps"),
            "cells": cells,
        })  # fmt: skip
    by_variant = {row["variant"]: row["cells"] for row in rows}
    verdicts = [_verdict(claim, by_variant) for claim in comparison.claims]
    return {
        "name": comparison.name,
        "title": comparison.title,
        "metrics": comparison.metrics,
        "note": comparison.note,
        "rows": rows,
        "claims": [v for v in verdicts if v is not None],
    }


def _verdict(claim: Claim, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """agrees, disagrees, or undecided: a difference below the two spreads together (or one seed)."""
    pair = [rows.get(name, {}).get(claim.metric) for name in (claim.better, claim.worse)]
    if None in pair:
        return None
    better, worse = pair
    gain = (worse["mean"] - better["mean"]) * (1 if claim.lower else -1)
    noise = better["std"] + worse["std"]
    seeds = min(len(better["values"]), len(worse["values"]))
    decided = abs(gain) > noise and seeds > 1
    verdict = ("agrees" if gain > 0 else "disagrees") if decided else "undecided"
    return {
        "says": claim.says,
        "metric": claim.metric,
        "better": claim.better,
        "worse": claim.worse,
        "here": [better["mean"], worse["mean"]],
        "verdict": verdict,
        "why": "" if verdict == "agrees" else claim.otherwise,
    }


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine = " · ".join(f"{k} {v}" for k, v in report["machine"].items())
    lines = [
        "# The papers' comparisons at a small scale",
        "",
        machine,
        "",
        f"plan {report['plan']} · {report['clips']} · {report['jobs_done']} jobs in "
        f"{report['seconds']:.0f} s ({report['cpu_seconds']:.0f} s of CPU)",
        "",
        _INTRODUCTION,
    ]
    if report["jobs_missing"]:
        lines += ["", f"Not run: {', '.join(report['jobs_missing'])}."]
    for comparison in report["comparisons"]:
        lines += ["", f"## {comparison['title']}", "", *_table(comparison)]
        if comparison["note"]:
            lines += ["", comparison["note"]]
        for claim in comparison["claims"]:
            lines += ["", _sentence(claim, comparison["metrics"])]
    return "\n".join(lines) + "\n"


def _table(comparison: dict[str, Any]) -> list[str]:
    metrics = comparison["metrics"]
    head = ["", *(name.strip() for name in metrics.values()), "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in comparison["rows"]:
        cells = [_cell(row["cells"].get(metric)) for metric in metrics]
        lines.append(f"| {' | '.join([row['variant'], *cells, str(len(row['seeds']))])} |")
    return lines


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    text = _number(cell["mean"])
    return f"{text} ± {_number(cell['std'])}" if len(cell["values"]) > 1 else text


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _sentence(claim: dict[str, Any], metrics: dict[str, str]) -> str:
    name = metrics.get(claim["metric"], claim["metric"]).strip()
    here = " against ".join(_number(v) for v in claim["here"])
    text = (
        f"- **{claim['verdict']}**: {claim['better']} before {claim['worse']} in {name}: {here}. "
        f"Paper: {claim['says']}."
    )
    return text + (f" Likely why not: {claim['why']}." if claim["why"] else "")


def slug(machine: dict[str, Any]) -> str:
    """The machine as a part of a file name."""
    text = f"{machine['cpu']} {machine['threads']} threads".lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def write_report(report: dict[str, Any], path: Path) -> str:
    """Write `path` (JSON) and its .md beside it; returns the Markdown."""
    text = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(report, indent=1) + "\n")
    atomic_write_text(path.with_suffix(".md"), text)
    return text
