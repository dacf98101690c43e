"""mf.info() tells what is built and in use, also on a machine without GPU or compiled core."""

from __future__ import annotations

import dataclasses
import json
import platform
from types import SimpleNamespace

import pytest
import torch

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.info import openmp_libraries


def test_names_versions_threads_and_openmp() -> None:
    facts = mf.info()
    assert facts.version == mf.__version__
    assert facts.torch == torch.__version__
    assert facts.python == platform.python_version()
    assert facts.threads == torch.get_num_threads()
    text = str(facts)
    for word in ("ISA in use", "OpenMP library", "CUDA architectures", facts.cpu, *facts.openmp):
        assert word in text
    assert json.loads(json.dumps(dataclasses.asdict(facts)))["version"] == mf.__version__


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    torch.rand(4, 4) @ torch.rand(4, 4)
    assert len(openmp_libraries()) == 1


def test_the_openmp_reader_knows_the_common_runtimes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        f"7f0000-7f1000 r-xp 00000000 08:01 12 {path}"
        for path in (
            "/a b/lib/libgomp-24e2ab19.so.1.0.0",
            "/opt/libiomp5.so",
            "/opt/libomp.so.5",
            "/opt/libompl-other.so",
            "/usr/lib/libc.so.6",
        )
    ]
    lines.append("7f0000-7f1000 rw-p 00000000 00:00 0")
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: "\n".join(lines))
    assert openmp_libraries() == (
        "/a b/lib/libgomp-24e2ab19.so.1.0.0",
        "/opt/libiomp5.so",
        "/opt/libomp.so.5",
    )


def test_reports_a_built_core(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {"compiler": "gcc 13", "isa_levels": "baseline,avx2", "cuda_archs": "80,90a"}
    fake = SimpleNamespace(
        build_info=lambda: {**build, "cuda_runtime": 12080}, detect_isa=lambda: 1
    )
    monkeypatch.setattr(_native, "core", lambda: fake)
    monkeypatch.setattr(_native, "core_cuda", lambda: fake)
    monkeypatch.setattr(_native, "_isa", 0)
    facts = mf.info()
    assert (facts.compiler, facts.isa_built) == ("gcc 13", "baseline, avx2")
    assert (facts.isa_detected, facts.isa_in_use) == ("avx2", "baseline")
    assert (facts.cuda_core, facts.cuda_archs) == ("built, runtime 12080", "80, 90a")


def test_reports_a_missing_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NotImplementedError("not built")

    monkeypatch.setattr(_native, "core", missing)
    monkeypatch.setattr(_native, "core_cuda", missing)
    facts = mf.info()
    assert facts.isa_built == "none"
    assert facts.cuda_core == "not built"
    assert "not built" in facts.compiler


def test_default_impl_switches_and_restores() -> None:
    before = _native.current_impl()
    with _native.default_impl("reference"):
        assert mf.info().impl == "reference"
        assert not _native.use_native("some_op", "auto", None)
        with _native.default_impl("native"), pytest.raises(NotImplementedError, match="obstacle"):
            _native.use_native("some_op", "auto", "an obstacle")
        assert _native.current_impl() == "reference"
    assert _native.current_impl() == before
    with pytest.raises(ValueError, match="impl: expected"), _native.default_impl("fast"):
        pytest.fail("the block must not run")
