"""diffusers' video autoencoders in their published sizes before and after `mf.patch`: one table.

    python -m benchmarks.patched_models [--only PATTERN] [--again] [--out FILE.json]

Each model is made with the defaults of its class (random weights) and measured by
`magvit-fast bench --model` in a process of its own: encode and decode of one clip, the candidates taking
turns, medians. Patched both ways: as it is, and with channels_last=True, then against the unpatched
model in the memory format that suits it better (the column "unpatched" says which). Every row is written as soon
as it is there, into the JSON file and the table beside it; a later run on the same machine goes on with
the rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe

HERE = Path(__file__).resolve().parent


class Model(NamedTuple):
    """widths: of the first and the widest level; all are 96 or more. frames, size: the clip."""

    widths: str
    frames: int = 9
    size: int = 64


# Cosmos cuts its clip into patches of 4x4x4 first: its first level has the planes of the others then.
MODELS = {
    "AutoencoderKLWan": Model("96 to 384"),
    "AutoencoderKLQwenImage": Model("96 to 384"),
    "AutoencoderKLCogVideoX": Model("128 to 512"),
    "AutoencoderKLHunyuanVideo": Model("128 to 512"),
    "AutoencoderKLMagvit": Model("128 to 512"),
    "AutoencoderVidTok": Model("128 to 512"),
    "AutoencoderKLCosmos": Model("128 to 512", 17, 256),
}


def key(name: str, channels_last: bool) -> str:
    return f"{name}{', channels_last=True' if channels_last else ''}"


def measure(name: str, channels_last: bool, repeats: int) -> dict[str, Any]:
    model = MODELS[name]
    command = [sys.executable, "-m", "magvit_fast.cli.main", "bench", "--json"]
    command += ["--model", f"diffusers:{name}"]
    command += ["--frames", str(model.frames), "--size", str(model.size)]
    command += ["--repeats", str(repeats), *(["--channels-last"] if channels_last else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def row(name: str, facts: dict[str, Any]) -> str:
    cells = [f"{name} ({MODELS[name.partition(',')[0]].widths})"]
    cells.append("x".join(map(str, facts["shape"][2:])))
    cells.append(facts["unpatched_format"])
    for part in ("encode", "decode"):
        before, after = facts[f"{part}_seconds"], facts[f"patched_{part}_seconds"]
        cells.append(f"{before:.2f} → {after:.2f} s")
    cells.append(f"{facts['speedup']:.2f}x")
    for part in ("encode", "decode"):
        peaks = facts[f"{part}_peak_bytes"], facts[f"patched_{part}_peak_bytes"]
        cells.append(" → ".join(f"{(p or 0) / 2**20:.0f}" for p in peaks))
    cells.append(f"{max(facts['encode_difference'], facts['decode_difference']):.1e}")
    cells.append(f"{facts['swapped']} / {len(facts['left'])}")
    return "| " + " | ".join(cells) + " |"


def table(machine: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"Machine: {machine['cpu']}, {machine['threads']} threads, {machine['isa']}; "
        f"torch {machine['torch']}. One clip, float32, random weights, medians; "
        "`python -m benchmarks.patched_models`.",
        "",
        "| model (channels) | clip | unpatched | encode | decode | both | peak MiB, encode | decode | difference "
        "| swapped / left |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row(name, facts) for name, facts in rows.items())]) + "\n"


def write(out: Path, machine: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Both files, whole or not at all, the rows in the order of MODELS."""
    order = [key(name, last) for name in MODELS for last in (False, True)]
    rows = {name: rows[name] for name in order if name in rows}
    text = json.dumps({"machine": machine, "models": rows}, indent=1) + "\n"
    for path, content in ((out, text), (out.with_suffix(".md"), table(machine, rows))):
        part = path.with_name(path.name + ".part")
        part.write_text(content)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this pattern")
    parser.add_argument("--again", action="store_true", help="measure rows that are there as well")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads".lower())
    out = args.out or HERE / "results" / f"patched-models-cpu-{slug.strip('-')}.json"
    rows: dict[str, dict[str, Any]] = {}
    if out.exists():
        kept = json.loads(out.read_text())
        rows = kept["models"] if kept["machine"] == machine else {}
    for name in MODELS:
        for channels_last in (False, True):
            wanted = key(name, channels_last)
            if re.search(args.only, wanted) and (args.again or wanted not in rows):
                rows[wanted] = measure(name, channels_last, args.repeats)
                write(out, machine, rows)
                print(row(wanted, rows[wanted]), flush=True)


if __name__ == "__main__":
    main()
