"""A whole tokenizer: encode, decode and a training step, against the same modules with impl="reference".

    python benchmarks/e2e_tokenizer.py [--preset magvit-v2-base] [--frames 17] [--size 128] [--out FILE.json]

Prints one table: seconds of the native kernels and of plain PyTorch in the better of its two memory formats
(which one is said), the ratio, and peak memory. Times are medians of interleaved rounds in one process. Memory is
the peak of a fresh process that does the work once: all of it, and what came on top of the weights and inputs.
In inference the native modules take the finest level of a large clip through time in pieces; the reference takes
it whole, since plain PyTorch would copy the frames that layers remember.
The training step is the generator's of another preset: forward, reconstruction and quantizer losses, backward, Adam.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs as a file, too

import torch  # noqa: E402

from benchmarks import tokenizer_work  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from magvit_fast import _native  # noqa: E402

FORMATS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
CANDIDATES = (
    ("native", "channels_last"),
    ("reference", "channels_last"),
    ("reference", "contiguous"),
)


@dataclass(frozen=True)
class Work:
    """What is measured: "encode", "decode" or "train" of a preset on one clip of noise."""

    what: str
    preset: str
    frames: int
    size: int
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.preset} {self.what} {self.frames}x{self.size}x{self.size} {self.dtype}"


def prepare(work: Work, layout: str) -> Callable[[], object]:
    """The work as a call; weights and inputs exist when it returns."""
    dtype, memory_format = getattr(torch, work.dtype), FORMATS[layout]
    tokenizer = tokenizer_work.drawn_tokenizer(work.preset, "cpu", dtype)
    if work.what == "decode":
        latent = tokenizer_work.codes(
            tokenizer, 1, work.frames, work.size, "cpu", dtype, memory_format
        )
        return lambda: tokenizer_work.decode(tokenizer, latent)
    video = tokenizer_work.noise(1, work.frames, work.size, "cpu", dtype, memory_format)
    if work.what == "encode":
        return lambda: tokenizer_work.encode(tokenizer, video)
    optimizer = tokenizer_work.adam(tokenizer.train())
    return lambda: tokenizer_work.training_step(tokenizer, optimizer, video)


def seconds(work: Work, rounds: int) -> dict[str, float]:
    """Median seconds of every candidate, interleaved."""
    calls = {}
    for impl, layout in CANDIDATES:
        calls[impl, layout] = prepare(work, layout)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for index in range(rounds + 1):
        for key, call in calls.items():
            with _native.default_impl(key[0]):  # type: ignore[arg-type]
                start = time.perf_counter()
                call()
            if index:  # the first round warms up
                taken[key].append(time.perf_counter() - start)
    return {f"{impl}_{layout}": statistics.median(t) for (impl, layout), t in taken.items()}


def _status_mib(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    assert match, f"{key} is not in /proc/self/status"
    return int(match[1]) / 1024


def measure_memory(work: Work, impl: str, layout: str) -> dict[str, float]:
    """In this process: peak memory in MiB, all of it and beyond weights and inputs."""
    with _native.default_impl(impl):  # type: ignore[arg-type]
        call = prepare(work, layout)
        if work.what == "train":
            call()  # gradients and the state of Adam exist from the second step on
            ctypes.CDLL(None).malloc_trim(0)  # what the first step has freed is not yet in use
        before = _status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        call()
    peak = _status_mib("VmHWM")
    return {"peak_mib": peak, "beyond_weights_mib": peak - before}


def memory(work: Work, impl: str, layout: str, threads: int) -> dict[str, float]:
    """`measure_memory` in a process of its own, whose allocator gives freed memory back at once: the
    peak is then what was in use, not what fragments kept."""
    request = json.dumps({"work": asdict(work), "impl": impl, "layout": layout, "threads": threads})
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", request],
        capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(work: Work, rounds: int, threads: int) -> dict[str, Any]:
    times = seconds(work, rounds)
    best = min((k for k in times if k != "native_channels_last"), key=lambda k: times[k])
    layout = best.removeprefix("reference_")
    ours = memory(work, "native", "channels_last", threads)
    theirs = memory(work, "reference", layout, threads)
    return {
        "work": work.title,
        "seconds": times,
        "best_reference": layout,
        "ratio": times[best] / times["native_channels_last"],
        "native_memory": ours,
        "reference_memory": theirs,
        "memory_share": ours["peak_mib"] / theirs["peak_mib"],
        "memory_share_beyond_weights": ours["beyond_weights_mib"] / theirs["beyond_weights_mib"],
    }


def render(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        " · ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "| work | native s | reference s | its format | ratio | peak MiB, native / reference | share | "
        "beyond weights | share |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        ours, theirs = r["native_memory"], r["reference_memory"]
        lines.append(
            f"| {r['work']} | {r['seconds']['native_channels_last']:.3f} "
            f"| {r['seconds']['reference_' + r['best_reference']]:.3f} | {r['best_reference']} "
            f"| {r['ratio']:.2f}x | {ours['peak_mib']:.0f} / {theirs['peak_mib']:.0f} "
            f"| {r['memory_share']:.0%} "
            f"| {ours['beyond_weights_mib']:.0f} / {theirs['beyond_weights_mib']:.0f} "
            f"| {r['memory_share_beyond_weights']:.0%} |"
        )
    return "\n".join(lines)


def keep(out: Path, rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Write the rows, and those of other works that an earlier run on this machine has left there."""
    earlier = json.loads(out.read_text()) if out.exists() else {"machine": machine, "rows": []}
    if earlier["machine"] != machine:
        raise SystemExit(f"{out}: holds rows of another machine or version: {earlier['machine']}")
    new = {r["work"] for r in rows}
    rows = [r for r in earlier["rows"] if r["work"] not in new] + rows
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(render(rows, machine) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="magvit-v2-base", help="of encode and decode")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128, help="height and width")
    parser.add_argument("--train-preset", default="magvit-v2-small")
    parser.add_argument("--train-size", type=int, default=64)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="of encode and decode"
    )
    parser.add_argument("--only", nargs="+", default=["encode", "decode", "train"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="JSON file, a table beside it; rows of other works in it stay"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        request = json.loads(args.memory_of)
        torch.set_num_threads(request["threads"])
        print(
            json.dumps(measure_memory(Work(**request["work"]), request["impl"], request["layout"]))
        )
        return
    works = [
        Work(what, args.preset, args.frames, args.size, dtype)
        for dtype in args.dtypes
        for what in ("encode", "decode")
        if what in args.only
    ]
    if "train" in args.only:
        works.append(Work("train", args.train_preset, args.frames, args.train_size, "float32"))
    rows = []
    for work in works:
        rows.append(row(work, args.rounds, torch.get_num_threads()))
        print(render(rows[-1:], {}).splitlines()[-1], flush=True)
    machine = describe()
    if args.out:
        keep(args.out, rows, machine)
    print("\n" + render(rows, machine))


if __name__ == "__main__":
    main()
