"""The door to the compiled cores: which implementation runs, at which instruction set, on which stream.

torch is imported first, always: the cores link to `libgomp.so.1`, and the copy that torch has already
loaded is then the one they share (one thread pool, governed by `torch.set_num_threads`).
Importing this module touches no CUDA state.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Literal

import torch

from magvit_fast import _recycled

Impl = Literal["auto", "native", "reference"]

# The library object must outlive the ops that are registered on it.
LIB: torch.library.Library = torch.library.Library("magvit_fast", "DEF")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")

HUGE_PAGES_FROM = 4 << 20  # bytes; less fits no two pages with certainty

log = logging.getLogger("magvit_fast")
LOG = os.environ.get("MAGVIT_FAST_LOG", "0") not in ("", "0")
SYNC = os.environ.get("MAGVIT_FAST_SYNC", "0") not in ("", "0")

_core_error: Exception | None = None
try:
    from magvit_fast import _core

    _cpu_core: Any = _core
except ImportError as error:  # a source tree that was never built: the references still work
    _cpu_core = None
    _core_error = error


def _initial_isa() -> int:
    if _cpu_core is None:
        return 0
    level = int(_cpu_core.detect_isa())
    cap = os.environ.get("MAGVIT_FAST_MAX_ISA")
    if cap:
        if cap not in ISA_LEVELS:
            raise ValueError(
                f"MAGVIT_FAST_MAX_ISA: expected one of {', '.join(ISA_LEVELS)}, got {cap!r}"
            )
        level = min(level, ISA_LEVELS.index(cap))
    return level


_isa = _initial_isa()
_default_impl: str = os.environ.get("MAGVIT_FAST_IMPL", "auto")
if _default_impl not in ("auto", "native", "reference"):
    raise ValueError(f"MAGVIT_FAST_IMPL: expected auto, native or reference, got {_default_impl!r}")


def isa() -> int:
    """The instruction-set level in use, an index into ISA_LEVELS."""
    return _isa


# The kernels for compute capability 9.0 alone (Hopper) have not yet been run on a device: off by default.
_sm90a = False


def sm90a() -> bool:
    """Whether kernels for compute capability 9.0 alone may serve, where there are any."""
    return _sm90a


@contextlib.contextmanager
def sm90a_kernels(on: bool = True) -> Iterator[None]:
    """Let kernels for compute capability 9.0 alone serve inside the block, or keep them from it."""
    global _sm90a
    before = _sm90a
    _sm90a = on
    try:
        yield
    finally:
        _sm90a = before


@contextlib.contextmanager
def max_isa(level: str) -> Iterator[str]:
    """Cap the instruction set inside the block (tests and benchmarks); yields the level in use."""
    global _isa
    if level not in ISA_LEVELS:
        raise ValueError(f"level: expected one of {', '.join(ISA_LEVELS)}, got {level!r}")
    before = _isa
    _isa = min(before, ISA_LEVELS.index(level))
    try:
        yield ISA_LEVELS[_isa]
    finally:
        _isa = before


def current_impl() -> str:
    """What `impl="auto"` means now: auto, native or reference."""
    return _default_impl


def core() -> Any:
    """The CPU core."""
    if _cpu_core is None:
        raise NotImplementedError(
            f"the compiled CPU core is missing ({_core_error}); run `pip install .` from the project's root"
        )
    return _cpu_core


@functools.cache
def _load_cuda_core() -> tuple[Any, str]:
    try:
        from magvit_fast import _core_cuda
    except ImportError as error:
        return None, str(error)
    return _core_cuda, ""


def core_cuda() -> Any:
    """The CUDA core, loaded at first use (its runtime is linked statically: loading needs no driver)."""
    module, why = _load_cuda_core()
    if module is None:
        raise NotImplementedError(
            f"this installation has no CUDA kernels ({why}); "
            "reinstall with nvcc on the PATH and MAGVIT_FAST_CUDA=ON"
        )
    return module


def missing_core(device: torch.device) -> str | None:
    """Why no compiled core serves this device, or None."""
    if device.type == "cpu":
        return (
            None if _cpu_core is not None else f"the compiled CPU core is missing ({_core_error})"
        )
    if device.type == "cuda":
        module, why = _load_cuda_core()
        return None if module is not None else f"this installation has no CUDA kernels ({why})"
    return f"there are no native kernels for device type '{device.type}'"


def use_native(op: str, impl: str, obstacle: str | None, *, slower: bool = False) -> bool:
    """Decide between the native kernel and the reference.

    `obstacle` says why the native kernel cannot run these arguments (None: it can). An explicit
    `impl="native"` never falls back: it raises NotImplementedError with that reason. Where the native
    kernel can run but is `slower`, "auto" takes the reference.
    """
    if impl not in ("auto", "native", "reference"):
        raise ValueError(f"impl: expected 'auto', 'native' or 'reference', got {impl!r}")
    chosen = _default_impl if impl == "auto" else impl
    if chosen == "reference":
        return False
    if obstacle is None and torch._C._are_functorch_transforms_active():
        obstacle = "torch.func's transforms have no rule for the kernels' gradients"
    if obstacle is None:
        return not (slower and chosen == "auto")
    if chosen == "native":
        raise NotImplementedError(f"{op}: impl='native' cannot run here: {obstacle}")
    return False


def joins_passes(device: torch.device) -> bool:
    """Whether kernels there may make what the next op needs of a result before they write it."""
    return device.type == "cuda"


def dtype_code(dtype: torch.dtype) -> int:
    return DTYPE_CODES[dtype]


def native_dtype_obstacle(dtype: torch.dtype) -> str | None:
    if dtype in DTYPE_CODES:
        return None
    return f"dtype {dtype} is served by the reference only (native: float32, bfloat16, float16)"


def cuda_stream(device: torch.device) -> tuple[int, int]:
    """(device index, raw current stream). Asked for at every launch: graphs and side streams change it."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    raw: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is not None:
        return index, int(raw(index))
    return index, int(torch.cuda.current_stream(index).cuda_stream)


def launcher(device: torch.device) -> tuple[Any, int, int]:
    """(core module, and the two numbers that end every native call) for a device.

    CPU: (isa, num_threads); the OpenMP setting is per thread, so it is passed, not assumed.
    CUDA: (device index, raw current stream).
    """
    if device.type == "cuda":
        return (core_cuda(), *cuda_stream(device))
    return core(), _isa, torch.get_num_threads()


def in_huge_pages(x: torch.Tensor) -> torch.Tensor:
    """x, freshly allocated: where it is large and on the CPU, in memory that is ready to be written.

    That is what an earlier result of its size has left, or else pages of 2 MiB if the system can. A
    large tensor comes as new memory of the system, page by page at its first writing; in small
    pages that takes longer than a kernel that runs at the speed of memory.
    """
    if x.device.type == "cpu" and x.nbytes >= HUGE_PAGES_FROM and not _recycled.take(x):
        core().advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


# Fresh memory costs page faults at every call; so each thread keeps its last workspace, if it is not
# too large.
_KEPT_BYTES = 64 << 20
_kept = threading.local()


def workspace(size: int, device: torch.device) -> torch.Tensor:
    """`size` bytes of any contents, for one native call of this thread that ends before the next one."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    if size > _KEPT_BYTES:
        return in_huge_pages(torch.empty(size, dtype=torch.uint8))
    held: torch.Tensor | None = getattr(_kept, "workspace", None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        core().advise_huge_pages(held.data_ptr(), size)
        _kept.workspace = held
    return held


def finish(device: torch.device) -> None:
    """With MAGVIT_FAST_SYNC=1, wait for the kernel, so that its error surfaces at its own call."""
    if SYNC and device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def default_impl(impl: Impl) -> Iterator[None]:
    """What impl="auto" means inside the block (the whole process; for tests and benchmarks)."""
    global _default_impl
    if impl not in ("auto", "native", "reference"):
        raise ValueError(f"impl: expected 'auto', 'native' or 'reference', got {impl!r}")
    before = _default_impl
    _default_impl = impl
    try:
        yield
    finally:
        _default_impl = before


def trace(op: str, **facts: object) -> None:
    """With MAGVIT_FAST_LOG=1, say what is about to run, before it runs: a crash then leaves evidence.

    On stderr: what commands print on stdout is read by machines (--json).
    """
    if LOG and not torch.compiler.is_compiling():
        line = f"magvit_fast.{op} " + " ".join(f"{k}={v}" for k, v in facts.items())
        print(line, file=sys.stderr, flush=True)
