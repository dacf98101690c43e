"""The rules of the house that a test can hold (ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from magvit_fast import _native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "magvit_fast"
CPP_FILES = sorted(p for s in ("*.h", "*.cpp", "*.cu", "*.cuh") for p in CSRC.rglob(s))
PY_FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = re.findall(r"^mf_add_op\((\w+)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
MAX_LINES = 500


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_room_is_complete() -> None:
    assert ROOMS, "CMakeLists.txt lists no op"
    for op in ROOMS:
        for needed in (
            f"csrc/{op}/{op}.h",
            f"csrc/{op}/cpu.cpp",
            f"csrc/{op}/bindings.cpp",
            f"python/magvit_fast/ops/{op}.py",
            f"tests/ops/test_{op}.py",
            f"benchmarks/problems/{op}.toml",
            f"benchmarks/bench_{op}.py",
        ):
            assert (ROOT / needed).is_file(), f"room {op}: {needed} is missing"
        assert list((CSRC / op).glob("*.cu")), f"room {op}: no CUDA kernel"
        assert list((CSRC / op).glob("*.simd.cpp")), f"room {op}: no vectorized CPU kernel"


def test_every_op_file_is_a_room() -> None:
    ops = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    assert ops == set(ROOMS)
    assert {p.name for p in CSRC.iterdir() if p.is_dir()} == set(ROOMS) | {"common"}


@pytest.mark.parametrize("op", ROOMS)
def test_op_files_have_the_six_sections_in_order(op: str) -> None:
    text = (PACKAGE / "ops" / f"{op}.py").read_text()
    found = re.findall(r"^# --- ([a-z ]+?) -+$", text, re.MULTILINE)
    assert found == ["contract", "reference", "schema and fake", "launch", "autograd", "public"]


@pytest.mark.parametrize("op", ROOMS)
def test_symbols_carry_the_name_of_their_op(op: str) -> None:
    bindings = (CSRC / op / "bindings.cpp").read_text()
    assert f"bind_{op}(" in bindings
    names = re.findall(r'm\.def\(\s*"(\w+)"', bindings)
    assert names, "bindings.cpp defines nothing"
    assert all(name.startswith(op) for name in names), names


@pytest.mark.parametrize("path", CPP_FILES, ids=_relative)
def test_cpp_files_open_with_the_walk(path: Path) -> None:
    lines = path.read_text().splitlines()
    head: list[str] = []
    for line in lines:
        if not line.startswith("//"):
            break
        head.append(line)
    text = " ".join(head)
    assert len(head) >= 3, f"{_relative(path)}: opens with fewer than three comment lines"
    assert "Previous hop:" in text, f"{_relative(path)}: does not name the previous hop"
    assert "Next hop:" in text, f"{_relative(path)}: does not name the next hop"


@pytest.mark.parametrize("path", CPP_FILES, ids=_relative)
def test_csrc_knows_no_framework(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', text)
    if path.name not in ("bindings.cpp", "module.cpp"):
        assert "<pybind11" not in text, "only bindings.cpp and module.cpp may know Python"
    assert "getenv" not in text, "kernels read no environment"
    assert not re.search(
        r"\b(malloc|cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize)\s*\(", text
    )


@pytest.mark.parametrize(
    "path", [p for p in CPP_FILES if p.name.endswith(".simd.cpp")], ids=_relative
)
def test_simd_files_use_no_standard_templates(path: Path) -> None:
    # An inline function of the standard library, compiled for new instructions, could be the copy
    # that the linker keeps for everyone: an illegal instruction on an older machine.
    allowed = {"cstdint", "cstring", "cstddef", "immintrin.h"}
    system = set(re.findall(r"#include\s*<([^>]+)>", path.read_text()))
    assert system <= allowed, system - allowed
    assert "common/parallel.h" not in path.read_text(), "threads belong to cpu.cpp"


@pytest.mark.parametrize("path", [*CPP_FILES, *PY_FILES], ids=_relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


# What each room of the package may import from the package (house rule 3: one direction).
LAYERS: dict[str, set[str]] = {
    "_native": {"_recycled"},
    "_recycled": set(),
    "errors": set(),
    "info": {"_native"},
    "ops": {"_native", "errors"},
    "nn": {"ops", "errors"},
    "models": {"nn", "ops", "errors", "data.atomic"},
    "tasks": {"nn", "ops", "errors"},
    "data": {"errors"},
    "metrics": {"errors"},
    "testing": {"_native", "ops", "errors"},
    "training": {"tasks", "models", "nn", "ops", "data", "metrics", "errors", "_native"},
    "decoding": {"tasks", "models", "nn", "ops", "errors"},
    "planning": {"decoding", "models", "metrics", "ops", "errors"},
    "compat": {"tasks", "models", "nn", "ops", "errors", "_native"},
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("magvit_fast")
        ):
            module = node.module.removeprefix("magvit_fast").lstrip(".")
            found |= {module or a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("magvit_fast.")
                for a in node.names
                if a.name.startswith("magvit_fast.")
            }
    return found


@pytest.mark.parametrize("room", sorted(LAYERS))
def test_imports_go_one_way(room: str) -> None:
    files = (
        [PACKAGE / f"{room}.py"]
        if (PACKAGE / f"{room}.py").exists()
        else sorted((PACKAGE / room).rglob("*.py"))
    )
    for path in files:
        for module in _imports(path):
            top = module.split(".")[0]
            if top in (room, "_core", "_core_cuda", "__version__"):
                continue
            allowed = LAYERS[room]
            assert top in allowed or module in allowed, f"{_relative(path)} imports {module}"


def test_the_table_of_rooms_says_what_is_held() -> None:
    told = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and not cells[0].startswith("`csrc"):
            for room in re.findall(r"`([^`]+)`", cells[0]):
                assert room not in told, f"{room} is there twice"
                told[room] = (
                    "all" if cells[2] == "everything" else set(re.findall(r"`([^`]+)`", cells[2]))
                )
    assert told == {**LAYERS, "cli": "all"}


def test_public_names_have_docstrings() -> None:
    import magvit_fast as mf

    for name in mf.__all__:
        thing = getattr(mf, name)
        if callable(thing):
            assert thing.__doc__, name
            assert len(thing.__doc__) > 80, f"{name}: the docstring says too little"


def test_environment_variables_stay_few() -> None:
    allowed = {"MAGVIT_FAST_IMPL", "MAGVIT_FAST_MAX_ISA", "MAGVIT_FAST_LOG", "MAGVIT_FAST_SYNC"}
    used = set()
    for path in PY_FILES:
        used |= set(re.findall(r'environ(?:\.get\(|\[)\s*"(\w+)"', path.read_text()))
    assert {v for v in used if v.startswith("MAGVIT_FAST")} <= allowed


def _fresh(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True, text=True, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_touches_no_cuda() -> None:
    heavy = [
        "av",
        "accelerate",
        "rich",
        "matplotlib",
        "scipy",
        "tensorboard",
        "huggingface_hub",
        "tyro",
    ]
    out = _fresh(
        "import sys, json, torch, magvit_fast\n"
        f"print(json.dumps([[m for m in {heavy!r} if m in sys.modules], torch.cuda.is_initialized()]))"
    )
    loaded, cuda_initialized = json.loads(out.splitlines()[-1])
    assert loaded == []
    assert cuda_initialized is False


def test_references_work_without_the_compiled_core() -> None:
    out = _fresh(
        "import sys\n"
        "sys.modules['magvit_fast._core'] = None\n"
        "import torch, magvit_fast as mf\n"
        "q, i = mf.lfq_quantize(torch.randn(1, 4, 2, 2))\n"
        "print(tuple(i.shape))\n"
        "try:\n    mf.lfq_quantize(torch.randn(1, 4, 2, 2), impl='native')\n"
        "except NotImplementedError as error:\n    print('missing' in str(error))"
    )
    assert out.splitlines()[-2:] == ["(1, 2, 2)", "True"]


def test_isa_cap_is_read_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGVIT_FAST_MAX_ISA", "baseline")
    assert _native.ISA_LEVELS[_native._initial_isa()] == "baseline"
    monkeypatch.setenv("MAGVIT_FAST_MAX_ISA", "sse9")
    with pytest.raises(ValueError, match=r"MAGVIT_FAST_MAX_ISA: expected one of .* got 'sse9'"):
        _native._initial_isa()
    monkeypatch.delenv("MAGVIT_FAST_MAX_ISA")
    assert _native._initial_isa() >= _native.isa()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("first", ["torch", "magvit_fast"])
def test_one_openmp_runtime_in_the_process(first: str) -> None:
    out = _fresh(
        f"import {first}\n"
        "import torch, magvit_fast as mf, re\n"
        "mf.lfq_quantize(torch.randn(4, 8, 64, 64))\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(sorted(set(re.findall(r'\\S*(?:libgomp|libomp|libiomp)\\S*', maps))))"
    )
    files = ast.literal_eval(out.splitlines()[-1])
    assert len(files) == 1, files
    assert "torch" in files[0], "the runtime in use is not torch's own"
