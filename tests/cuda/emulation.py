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
    declared = "".join(f"void bind_{name}(pybind11::module_& m);\n" for name in names)
    called = "".join(f"  bind_{name}(m);\n" for name in names)
    return (
        "#pragma once\n#include <pybind11/pybind11.h>\nnamespace magvit_fast {\n"
        f"{declared}inline void bind_all(pybind11::module_& m) {{\n{called}}}\n}}\n"
    )


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    rooms = [source for room in _rooms() for source in (*room.glob("*.cu"), room / "bindings.cpp")]
    return [csrc / "module.cpp", csrc / "common/cuda/device.cu", EMULATOR / "emulator.cpp", *rooms]


def _digest() -> str:
    digest = hashlib.sha256(" ".join([_compiler(), torch.__version__, *FLAGS]).encode())
    for folder in (ROOT / "csrc", EMULATOR):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """The path of the module, built anew only when a source has changed."""
    folder = ROOT / "build" / "cuda_emulation" / _digest()
    module = folder / f"{NAME}.so"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ops.h").write_text(_ops_header())
    includes = [EMULATOR, ROOT / "csrc", folder, Path(torch.__file__).parent / "include"]
    command = [
        _compiler(),
        *FLAGS,
        *(f"-I{path}" for path in includes),
        f"-I{sysconfig.get_path('include')}",
        "-DMAGVIT_FAST_CUDA_MODULE=1",
        f"-DMF_MODULE_NAME={NAME}",
        *(f'-DMF_BUILT_{key}="emulated"' for key in ("ISA_LEVELS", "OPENMP", "CUDA_ARCHS")),
    ]

    def compile_one(source: Path) -> Path:
        target = folder / ("_".join(source.relative_to(ROOT).parts) + ".o")
        level = (
            "-O1" if source.suffix == ".cu" else "-O0"
        )  # bindings cost time to compile, not to run
        _run([*command, level, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, _sources()))
    whole = folder / f"{NAME}.{os.getpid()}"
    _run([_compiler(), "-shared", *map(str, objects), "-o", str(whole)])
    whole.replace(module)
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
