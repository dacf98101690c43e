"""What a measured figure needs beside it: the machine, the versions, the threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import magvit_fast as mf
from magvit_fast import _native


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            line.split(":", 1) for line in info.read_text().splitlines() if line.count(":") == 1
        )
        names = {k.strip(): v.strip() for k, v in fields.items()}
        family, model = names.get("cpu family", "?"), names.get("model", "?")
        return f"{names.get('model name', 'unknown')} (family {family}, model {model})"
    return platform.processor() or "unknown"


def describe() -> dict[str, str | int]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "isa": _native.ISA_LEVELS[_native.isa()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "magvit_fast": mf.__version__,
    }
