"""Builds the CUDA core as C++ on top of tests/cuda/emulator, so that its kernels run without a GPU.

The sources are those of `_core_cuda`, unchanged: csrc/module.cpp, every bindings.cpp and every *.cu. Only
the CUDA headers and common/cuda/ptx.cuh come from the emulator.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
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


def _sources(folder: Path) -> list[Path]:
    """What is compiled, the longest first."""
    cpp = [ROOT / "csrc/module.cpp", EMULATOR / "selftest.cpp"]
    cpp += [room / "bindings.cpp" for room in _rooms()]
    # As one file: of the 3.5 s that each of them takes 3 are pybind11's.
    bindings = folder / "bindings.cpp"
    bindings.write_text("".join(f'#include "{source}"\n' for source in cpp))
    kernels = [source for room in _rooms() for source in sorted(room.glob("*.cu"))]
    return [bindings, *kernels, ROOT / "csrc/common/cuda/device.cu", EMULATOR / "emulator.cpp"]


def _digest(command: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    for file in files:
        digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()


def _included(rule: Path) -> list[Path]:
    """The files that the compiler read, by the make rule that it wrote; not those of the system."""
    names = rule.read_text().replace("\\\n", " ").partition(": ")[2]
    return [Path(n.replace("\\ ", " ")) for n in re.split(r"(?<!\\)\s+", names.strip())]


def _is_current(target: Path, command: list[str]) -> bool:
    rule, key = target.with_suffix(".d"), target.with_suffix(".key")
    if not (target.exists() and rule.exists() and key.exists()):
        return False
    files = _included(rule)
    return all(f.exists() for f in files) and key.read_text() == _digest(command, files)


def _compile(source: Path, target: Path, command: list[str]) -> None:
    """Make the object of a source unless it is current."""
    level = "-O1" if source.suffix == ".cu" else "-O0"  # bindings cost time to compile, not to run
    command = [*command, level, "-MMD", "-x", "c++", "-c", str(source), "-o", str(target)]
    if _is_current(target, command):
        return
    target.with_suffix(".key").unlink(missing_ok=True)
    _run(command)
    target.with_suffix(".key").write_text(_digest(command, _included(target.with_suffix(".d"))))


def build() -> Path:
    """The path of the module; compiles what has changed since the last time, one process at a time."""
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder)


def _build(folder: Path) -> Path:
    (folder / "ops.h").write_text(_ops_header())
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
    sources = _sources(folder)
    objects = [folder / ("_".join(s.relative_to(ROOT).parts) + ".o") for s in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, sources, objects, repeat(command)))
    module = folder / f"{NAME}.so"
    key = module.with_suffix(".key")
    command = [_compiler(), "-shared", *map(str, objects)]
    linked = _digest(command, [target.with_suffix(".key") for target in objects])
    if not (module.exists() and key.exists() and key.read_text() == linked):
        part = module.with_suffix(".part")  # another process may have the old one loaded
        _run([*command, "-o", str(part)])
        part.replace(module)
        key.write_text(linked)
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
