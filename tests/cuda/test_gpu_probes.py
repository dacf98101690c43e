"""The probes of `make gpu`: what they print is kept, what fails is told, and the wgmma probe's own sums are right."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from benchmarks import gpu_probes
from tests.cuda import emulation


def _python_probe(folder: Path, text: str) -> Path:
    source = folder / "probe.py"
    source.write_text(text)
    return source


def test_an_answer_is_kept(tmp_path: Path) -> None:
    source = _python_probe(tmp_path, "print('a warning')\nprint('{\"speed\": 2}')")
    result = gpu_probes.run_probe(source, (9, 0), time.perf_counter() + 60)
    assert result["status"] == 0
    assert result["answer"] == {"speed": 2}
    assert gpu_probes.lines({"probes": {"probe.py": result}}) == ['- probe.py: {"speed": 2}']


@pytest.mark.parametrize("text", ["print('{')", "print(3)", "raise SystemExit('no device')"])
def test_what_fails_is_told(text: str, tmp_path: Path) -> None:
    result = gpu_probes.run_probe(_python_probe(tmp_path, text), (9, 0), time.perf_counter() + 60)
    assert result["status"] != 0
    assert result["log"].strip() in gpu_probes.lines({"probes": {"probe.py": result}})[0]


def test_a_source_that_does_not_compile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_probes.shutil, "which", lambda name: str(tmp_path / name))  # not there
    monkeypatch.setattr(gpu_probes, "ROOT", tmp_path)
    source = tmp_path / "probe.cu"
    result = gpu_probes.run_probe(source, (9, 0), time.perf_counter() + 60)
    assert result["status"] == 127


def test_every_probe_is_asked_where_it_can_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_probe(source: Path, capability: tuple[int, int], deadline: float) -> dict[str, int]:
        assert source.is_file()
        asked.append(source.name)
        return {"status": len(asked)}

    monkeypatch.setattr(gpu_probes, "run_probe", run_probe)
    assert gpu_probes.probes((9, 0), 0.0)["status"] == len(asked) == len(gpu_probes.NEEDS)
    assert set(asked) == {p.name for p in gpu_probes.PROBES.iterdir() if p.suffix in (".cu", ".py")}
    asked.clear()
    gpu_probes.probes((8, 0), 0.0)
    assert asked == ["cudnn_frontend.py", "l2_bandwidth.cu"]


@pytest.mark.skipif(importlib.util.find_spec("cudnn") is not None, reason="it is installed")
def test_a_missing_package_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(gpu_probes.PROBES / "cudnn_frontend.py"), run_name="__main__")
    found = gpu_probes.answer(capsys.readouterr().out)
    assert found is not None
    assert "nvidia-cudnn-frontend" in found["missing"]


def test_wgmma_probe_on_the_emulator(tmp_path: Path) -> None:
    """Permuting by the address is what the emulator does: there the probe must find no wrong element."""
    obstacle = emulation.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    binary = tmp_path / "wgmma_shift"
    command = [
        emulation._compiler(), *emulation.FLAGS, "-O1", f"-I{emulation.EMULATOR}",
        f"-I{emulation.ROOT / 'csrc'}", "-x", "c++", str(gpu_probes.PROBES / "wgmma_shift.cu"),
        str(emulation.EMULATOR / "emulator.cpp"), "-o", str(binary),
    ]  # fmt: skip
    emulation._run(command)
    done = subprocess.run(
        [str(binary), "emulated"], capture_output=True, text=True, timeout=120, check=False
    )
    wrong = json.loads(done.stdout)
    assert len(wrong) == 9
    assert set(wrong.values()) == {0}
    others = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False)
    assert others.returncode == 1
    assert "a descriptor" in others.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", [n for n in gpu_probes.NEEDS if n.endswith(".cu")])
def test_probes_compile(name: str, tmp_path: Path) -> None:
    command = gpu_probes.compile_command(gpu_probes.PROBES / name, tmp_path / "probe", (9, 0))
    emulation._run([*command, "-Werror", "all-warnings"])
