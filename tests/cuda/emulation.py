"""Builds the CUDA core as C++ on top of tests/cuda/emulator, so that its kernels run without a GPU.

The sources are those of `_core_cuda`, unchanged: csrc/module.cpp, every bindings.cpp and every *.cu. Only
the CUDA headers and common/cuda/ptx.cuh come from the emulator.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "emulator"
NAME = "_core_cuda_emulated"
FLAGS = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-w", "-ffp-contract=off"]


def obstacle() -> str | None:
    """Why the emulated core cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator switches fibers in x86-64 assembly, this is {platform.machine()}"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler ({_compiler()})"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _rooms() -> list[Path]:
    return sorted({source.parent for source in (ROOT / "csrc").glob("*/*.cu")})


def _ops_header() -> str:
    names = [room.name for room in _rooms()]
    names.append("selftest")
    declared = "".join(f"void bind_{name}(pybind11::module_& m);\n" for name in names)
    called = "".join(f"  bind_{name}(m);\n" for name in names)
    return (
        "#pragma once\n#include <pybind11/pybind11.h>\nnamespace magvit_fast {\n"
        f"{declared}inline void bind_all(pybind11::module_& m) {{\n{called}}}\n}}\n"
    )


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    rooms = [source for room in _rooms() for source in (*room.glob("*.cu"), room / "bindings.cpp")]
    return [
        csrc / "module.cpp",
        csrc / "common/cuda/device.cu",
        *sorted(EMULATOR.glob("*.cpp")),
        *rooms,
    ]


def _digest(*files: Path) -> str:
    digest = hashlib.sha256(" ".join([_compiler(), torch.__version__, *FLAGS]).encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """The path of the module; compiles what has changed since the last time."""
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ops.h").write_text(_ops_header())
    headers = [folder / "ops.h"]
    for root in (ROOT / "csrc", EMULATOR):
        headers += sorted(p for p in root.rglob("*") if p.suffix in (".h", ".cuh"))
    includes = [EMULATOR, ROOT / "csrc", folder, Path(torch.__file__).parent / "include"]
    command = [
        _compiler(),
        *FLAGS,
        *(f"-I{path}" for path in includes),
        f"-I{sysconfig.get_path('include')}",
        "-DMAGVIT_FAST_CUDA_MODULE=1",
        f"-DMF_MODULE_NAME={NAME}",
        *(
            f'-DMF_BUILT_{key}="emulated"'
            for key in ("ISA_LEVELS", "OPENMP", "CUDA_ARCHS", "SANITIZERS")
        ),
    ]

    def compile_one(source: Path) -> Path:
        stem = "_".join(source.relative_to(ROOT).parts)
        target = folder / f"{stem}-{_digest(source, *headers)}.o"
        if target.exists():
            return target
        level = (
            "-O1" if source.suffix == ".cu" else "-O0"
        )  # bindings cost time to compile, not to run
        part = target.with_suffix(f".{os.getpid()}")  # never a half-written object under the name
        _run([*command, level, "-x", "c++", "-c", str(source), "-o", str(part)])
        return part.replace(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, _sources()))
    module = folder / f"{NAME}-{_digest(*objects)}.so"
    if not module.exists():
        part = module.with_suffix(f".{os.getpid()}")
        _run([_compiler(), "-shared", *map(str, objects), "-o", str(part)])
        part.replace(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
