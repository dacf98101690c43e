"""What was built and what is in use: `print(magvit_fast.info())`."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path

import torch

from magvit_fast import _native

_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.].*")


@dataclasses.dataclass(frozen=True)
class Info:
    """Facts about this installation and process. `print` it, or `dataclasses.asdict` it.

    `openmp` lists the OpenMP libraries mapped into the process: more than one would mean two thread
    pools that fight for the cores. `cuda_devices` is filled where torch sees a GPU.
    """

    version: str
    python: str
    torch: str
    os: str
    cpu: str
    compiler: str
    isa_built: str
    isa_detected: str
    isa_in_use: str
    openmp: tuple[str, ...]
    threads: int
    cuda_core: str
    cuda_archs: str
    cuda_devices: tuple[str, ...]
    impl: str

    def __str__(self) -> str:
        rows = {
            "magvit_fast": self.version,
            "Python": self.python,
            "torch": self.torch,
            "OS": self.os,
            "CPU": self.cpu,
            "compiler": self.compiler,
            "ISA levels built": self.isa_built,
            "ISA detected": self.isa_detected,
            "ISA in use": self.isa_in_use,
            "OpenMP library": ", ".join(self.openmp) or "none loaded",
            "threads": str(self.threads),
            "CUDA core": self.cuda_core,
            "CUDA architectures": self.cuda_archs,
            "CUDA devices": ", ".join(self.cuda_devices) or "none",
            "implementation": self.impl,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def info() -> Info:
    """Gather the facts. Looks for GPUs (and so starts the CUDA driver where there is one)."""
    from magvit_fast import __version__

    built, detected = _cpu_build()
    cuda_core, cuda_archs = _cuda_build()
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        compiler=str(built.get("compiler", "none: the CPU core is not built")),
        isa_built=_words(built.get("isa_levels", "none")),
        isa_detected=detected,
        isa_in_use=_native.ISA_LEVELS[_native.isa()] if built else "none",
        openmp=openmp_libraries(),
        threads=torch.get_num_threads(),
        cuda_core=cuda_core,
        cuda_archs=cuda_archs,
        cuda_devices=_cuda_devices(),
        impl=_native.current_impl(),
    )


def _words(value: object) -> str:
    """Lists from the build, joined by whatever CMake joins with -> "a, b, c"."""
    return ", ".join(re.findall(r"[^\s;,]+", str(value)))


def _cpu_build() -> tuple[dict[str, object], str]:
    try:
        core = _native.core()
    except NotImplementedError:
        return {}, "unknown: the CPU core is not built"
    return dict(core.build_info()), _native.ISA_LEVELS[int(core.detect_isa())]


def _cuda_build() -> tuple[str, str]:
    try:
        built = dict(_native.core_cuda().build_info())
    except NotImplementedError:
        return "not built", "none"
    return f"built, runtime {built['cuda_runtime']}", _words(built["cuda_archs"])


def _cuda_devices() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(f"{p.name} (sm_{p.major}{p.minor})" for p in properties)


def openmp_libraries() -> tuple[str, ...]:
    """Files of OpenMP runtimes (libgomp, libiomp5, libomp) in this process's memory map."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return ()
    mapped = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    files = {fields[5] for fields in mapped if len(fields) == 6}
    return tuple(sorted(file for file in files if _OPENMP.match(Path(file).name)))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()
