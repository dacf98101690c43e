"""diffusers' video autoencoders in their published sizes before and after `mf.patch`: one table.

    python -m benchmarks.patched_models [--only PATTERN] [--out FILE.json]

Each model is made with the defaults of its class (random weights) and measured by
`magvit-fast bench --model` in a process of its own: encode and decode of one clip, the candidates taking
turns, medians. Patched both ways: as it is, and with channels_last=True.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

HERE = Path(__file__).resolve().parent
# Widths of the first and the widest level; all are 96 or more.
MODELS = {
    "AutoencoderKLWan": "96 to 384",
    "AutoencoderKLQwenImage": "96 to 384",
    "AutoencoderKLCogVideoX": "128 to 512",
    "AutoencoderKLHunyuanVideo": "128 to 512",
    "AutoencoderKLMagvit": "128 to 512",
    "AutoencoderKLCosmos": "128 to 512",
}


def measure(name: str, channels_last: bool, frames: int, size: int, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "magvit_fast.cli.main", "bench", "--json"]
    command += ["--model", f"diffusers:{name}", "--frames", str(frames), "--size", str(size)]
    command += ["--repeats", str(repeats), *(["--channels-last"] if channels_last else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name}: {result.stderr.strip().splitlines()[-1]}")
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def row(name: str, facts: dict[str, Any]) -> str:
    cells = [f"{name}{', channels_last=True' if facts['channels_last'] else ''} ({MODELS[name]})"]
    for part in ("encode", "decode"):
        before, after = facts[f"{part}_seconds"], facts[f"patched_{part}_seconds"]
        cells.append(f"{before:.2f} → {after:.2f} s")
    cells.append(f"{facts['speedup']:.2f}x")
    for part in ("encode", "decode"):
        peaks = facts[f"{part}_peak_bytes"], facts[f"patched_{part}_peak_bytes"]
        cells.append(" → ".join(f"{(p or 0) / 2**20:.0f}" for p in peaks))
    cells.append(f"{max(facts['encode_difference'], facts['decode_difference']):.1e}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this pattern")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = describe()
    lines = [
        f"Machine: {machine['cpu']}, {machine['threads']} threads, {machine['isa']}; "
        f"torch {machine['torch']}. One clip {args.frames}x{args.size}x{args.size}, float32, medians.",
        "",
        "| model (channels) | encode | decode | both | peak MiB, encode | decode | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    found = []
    for name in (n for n in MODELS if re.search(args.only, n)):
        for channels_last in (False, True):
            facts = measure(name, channels_last, args.frames, args.size, args.repeats)
            found.append(facts)
            lines.append(row(name, facts))
            print(lines[-1], flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads".lower())
    out = args.out or HERE / "results" / f"patched-models-cpu-{slug.strip('-')}.json"
    out.write_text(json.dumps({"machine": machine, "models": found}, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
