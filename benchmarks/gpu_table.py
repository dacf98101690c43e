"""The table of the GPU session."""

from __future__ import annotations

from typing import Any

from benchmarks import gpu_compiled, gpu_probes
from benchmarks.gpu_row import SM90A


def _best(result: dict[str, Any]) -> tuple[str, float] | None:
    times = {
        name: way["ms"]
        for name, way in result["ways"].items()
        if name not in ("ours", SM90A) and "ms" in way and not way["informative"]
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def _rate(result: dict[str, Any], ms: float | None) -> str:
    if not ms:
        return ""
    rates = []
    if result.get("items"):
        rates.append(f"{result['items'] / ms * 1e3:.1f} {result['item']}/s")
    if result.get("flops"):
        rates.append(f"{result['flops'] / ms / 1e9:.0f} TFLOP/s")
    elif result.get("bytes"):
        rates.append(f"{result['bytes'] / ms / 1e9:.2f} TB/s")
    return ", ".join(rates)


def _own_cells(way: dict[str, Any], best: float | None) -> list[str]:
    """Time, ratio to the best of PyTorch and difference of one of our ways."""
    ms, difference = way.get("ms"), way.get("difference")
    time_cell = f"{ms:.4f}" if ms is not None else ("error" if "error" in way else "-")
    return [
        time_cell,
        f"{best / ms:.2f}x" if ms and best else "",
        f"{difference:.1e}" if difference is not None else "",
    ]


def table_line(result: dict[str, Any]) -> str:
    ours, newer, best = result["ways"].get("ours", {}), result["ways"].get(SM90A, {}), _best(result)
    theirs = best[1] if best else None
    fastest = [way["ms"] for way in (ours, newer) if "ms" in way]
    name = best[0] if best else result.get("error", "-")
    not_measured = result["ways"].get(gpu_compiled.WAY, {}).get("not_measured")
    if not_measured is not None:
        name += f" (torch.compile not measured: {not_measured[:60]})"
    cells = [
        result["row"],
        f"{theirs:.4f}" if theirs is not None else "-",
        name,
        *_own_cells(ours, theirs),
        *_own_cells(newer, theirs),
        _rate(result, min(fastest) if fastest else theirs),
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
        "| work | PyTorch ms | PyTorch's best way | ours ms | ratio | difference "
        "| sm90a kernels ms | ratio | difference | best rate of ours |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---|",
        *(table_line(result) for result in report["rows"]),
    ]  # fmt: skip
    lines += ["", *gpu_probes.lines(report["stages"].get("probes", {}))]
    left = report["stages"].get("bench", {}).get("left_out")
    if left:
        lines.append(f"\n{len(left)} rows left out, the time was up: {', '.join(left[:5])} ...")
    return "\n".join(lines)
