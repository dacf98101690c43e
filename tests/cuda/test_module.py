"""The CUDA module: loads without a driver, carries its runtime, and tile layouts are what kernels assume."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def core_cuda() -> ModuleType:
    try:
        return importlib.import_module("magvit_fast._core_cuda")
    except ImportError as error:
        pytest.skip(f"built without CUDA: {error}")


def test_loads_and_answers_without_a_driver(core_cuda: ModuleType) -> None:
    info = core_cuda.build_info()
    assert info["cuda_archs"]
    assert info["cuda_runtime"] >= 11000
    count = core_cuda.device_count()
    assert count == torch.cuda.device_count() or (count == 0 and torch.version.cuda is None)


def test_importing_touches_no_cuda_state() -> None:
    code = (
        "import torch, magvit_fast, magvit_fast._native as n\n"
        "n.missing_core(torch.device('cuda'))\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_links_neither_the_driver_nor_a_shared_runtime(core_cuda: ModuleType) -> None:
    assert core_cuda.__file__ is not None
    done = subprocess.run(
        ["readelf", "-d", core_cuda.__file__], capture_output=True, text=True, check=True
    )
    needed = [line for line in done.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "libcuda" in line]
