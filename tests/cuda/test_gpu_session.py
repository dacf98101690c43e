"""What `make gpu` measures: ours and PyTorch's ways of a row do the same work, and the session says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_fused, gpu_models, gpu_rows, gpu_session

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = {
    "name": "tiny", "batch": 2, "channels": [8, 16], "size": [3, 4, 5], "kernel": [3, 3, 3],
    "stride": [1, 1, 1], "with_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("work", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stride": [2, 2, 2]},
        {"kernel": [4, 4, 4], "stride": [1, 2, 2], "with_bias": False},
        {"kernel": [1, 1, 1]},
    ],
    ids=str,
)
def test_ways_of_a_convolution_agree(
    change: dict[str, Any], work: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_rows, "DEVICE", device.type)
    row = gpu_rows._conv_row({**PROBLEM, **change}, "float32", work)
    inputs = row.make()
    assert row.ours is not None
    actual = row.ours(*inputs)
    for way in row.ways.values():
        torch.testing.assert_close(actual, way(*inputs), rtol=1e-4, atol=1e-4)
    difference = gpu_session._difference(row, row.ours, inputs)
    assert difference is not None
    assert difference < 1e-5


def test_ways_of_small_ops_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu_fused, gpu_rows):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    rows = [*gpu_fused.norm_rows([("64 3x4x5", 2)]), *gpu_rows._embedding_rows(1)]
    assert [len(row.ways) for row in rows] == [1, 1, 1, 2, 2]
    for row in rows:
        inputs = row.make()
        assert row.ours is not None
        actual = gpu_session._first(row.ours(*inputs))
        for name, way in row.ways.items():
            expected = gpu_session._first(way(*inputs))
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=0.1, msg=name)


def test_both_ways_of_remasking_keep_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")
    row = next(gpu_rows._remask_rows())
    logits, tokens, unknown, count = row.make()
    sure = torch.full_like(logits, -30.0).scatter_(
        -1, torch.tensor(5).expand(*logits.shape[:3], 1), 30.0
    )
    assert len(row.ways) == 2
    for way in row.ways.values():
        new, still = way(sure, tokens, unknown, count)
        assert torch.equal(new[~unknown], tokens[~unknown])
        assert set(new[unknown].tolist()) == {5 + (5 << 9)}
        assert still.sum() == count[0]
        assert not (still & ~unknown).any()


def test_work_counts_taps_that_read_frames() -> None:
    problem = {**PROBLEM, "size": [1, 4, 5]}  # one frame: two of three taps read padding
    flops, moved = gpu_rows._conv_work(problem, (1, 4, 5), 2)
    assert flops == 2 * 2 * 4 * 5 * 9 * 8 * 16
    assert moved == 2 * (2 * 4 * 5 * (8 + 16) + 8 * 16 * 27)


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in gpu_rows.all_rows()]
    assert len(set(names)) == len(names)
    assert any("res_128_17x128x128_b8 bfloat16 forward" in name for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")
def test_without_a_device_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_table_names_the_winner() -> None:
    way = {"low_ms": 1.0, "high_ms": 1.0, "calls": 5, "method": "graph"}
    report = {
        "machine": {"gpu": "one"},
        "stages": {"build": {"status": 0}, "tests": {"status": 1}},
        "rows": [{
            "row": "work", "flops": 2e9, "bytes": 0.0, "items": 8.0, "item": "clips",
            "ways": {
                "ours": {**way, "ms": 1.0, "informative": False, "difference": 1e-3},
                gpu_session.SM90A: {**way, "ms": 0.5, "informative": False, "difference": 2e-3},
                "slow": {**way, "ms": 3.0, "informative": False},
                "less work": {**way, "ms": 0.1, "informative": True},
                "broken": {"error": "RuntimeError: no", "informative": False},
            },
        }],
    }  # fmt: skip
    text = gpu_session.table(report)
    assert (
        "| work | 3.0000 | slow | 1.0000 | 3.00x | 1.0e-03 | 0.5000 | 6.00x | 2.0e-03 "
        "| 16000.0 clips/s, 4 TFLOP/s |"
    ) in text
    assert "tests: FAILED (1)" in text


def test_kernels_off_by_default_are_tested_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that hangs may cost its own stage, not the tests of the others; and is then not measured.
    asked: list[tuple[str, ...]] = []
    gather, fused, weight_grad = paths = tuple(gpu_session.SM90A_TESTS.values())

    def pytest_of(seconds: float, *arguments: str) -> dict[str, Any]:
        asked.append(arguments)
        return {"status": 124 if arguments == (gather,) else 0}

    monkeypatch.setattr(gpu_session, "_pytest", pytest_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu_session.tests(float("inf"))
    stage = gpu_session.sm90a(float("inf"))
    assert stage["served"] == ["fused", "weight_grad"]
    assert stage["status"] == 124
    assert asked == [
        tuple(f"--ignore={path}" for path in paths),
        (gather,),
        (fused,),
        (weight_grad,),
    ]
    assert all((ROOT / path).is_file() for path in gpu_session.SM90A_TESTS.values())


def test_rows_name_the_kernels_that_may_serve_them() -> None:
    kernels = [gpu_rows._conv_row({**PROBLEM, "channels": [64, 64]}, "bfloat16", work).sm90a
               for work in ("forward", "input_grad", "weight_grad")]  # fmt: skip
    assert kernels == [("gather",), ("gather",), ("weight_grad",)]
    assert gpu_rows._conv_row(PROBLEM, "bfloat16", "weight_grad").sm90a == ()
    named = {kernel for row in gpu_rows.all_rows() for kernel in row.sm90a}
    assert named == set(gpu_session.SM90A_TESTS)


def test_whole_models_run_both_ways() -> None:
    rows = [
        *gpu_models.tokenizer_rows("cpu", "magvit-v2-demo", 1, 1, frames=5, size=16),
        gpu_models.generation_row("cpu", "magvit-v2-demo", "magvit-v2-demo", batch=1, steps=2),
    ]
    shapes = [(1, 2, 2, 2), (1, 3, 5, 16, 16), (), (1, 3, 17, 64, 64)]
    for row, shape in zip(rows, shapes, strict=True):
        inputs = row.make()
        assert row.ours is not None
        for way in (row.ours, *row.ways.values()):
            result = way(*inputs)
            assert tuple(result.shape) == shape, row.name
            assert bool(result.isfinite().all()) if result.is_floating_point() else True
        if row.compare:
            difference = gpu_session._difference(row, row.ours, inputs)
            assert difference is not None
            assert difference < 0.1
