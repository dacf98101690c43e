"""Two processes (gloo, CPU) against one with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import FRAME_MODEL, save_tokenizer
from tests.training.worker import work, work_in_fork

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--num_processes", "2"),
    *("--config_file", "recipes/accelerate/ddp.yaml"),
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Where the variable is unset accelerate sets it, with a warning; torchrun sets it to 1 as well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def fork(job: str, folder: Path) -> None:
    """The worker in two processes forked from this one (which saves importing torch again)."""
    from accelerate import debug_launcher

    folder.mkdir(parents=True, exist_ok=True)
    debug_launcher(work_in_fork, (job, str(folder)), num_processes=2)


def alone(job: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    work(job, str(folder))


def launch(launcher: tuple[str, ...], job: str, folder: Path) -> None:
    """The worker as a user starts it."""
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), job, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def history(folder: Path, processes: int) -> list[dict[str, float]]:
    facts: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert facts["processes"] == processes
    return facts["history"]


def assert_agree(one: list[dict[str, float]], two: list[dict[str, float]], rtol: float) -> None:
    """The first step sharply. Then Adam, which at first moves weights by the sign of their gradients,
    lets rounding grow."""
    assert [h["step"] for h in one] == [h["step"] for h in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        allowed = 1e-5 if a["step"] == 1 else rtol
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=allowed, abs=1e-5), (a["step"], name)


def test_gradients_of_both_networks_equal_those_of_one_process(tmp_path):
    """GAN, R1 (second derivatives), LeCam's and the codebook's global means: all under DDP."""
    alone("gradients", tmp_path / "one")
    fork("gradients", tmp_path / "two")
    one, two = (load_file(tmp_path / n / "gradients.safetensors") for n in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one.keys() == two.keys()
    assert one["value/discriminator_lecam"] > 1.0
    for name, expected in one.items():
        # A bias before a norm has gradient zero but for rounding: an absolute bound for those.
        bound = max(1e-4 * float(expected.abs().max()), 1e-6)
        torch.testing.assert_close(two[name], expected, rtol=0, atol=bound, msg=name)


def test_tokenizer_training_agrees_and_goes_on_in_one_process(tmp_path):
    alone("tokenizer", tmp_path / "one")
    fork("tokenizer", tmp_path / "two")
    two = history(tmp_path / "two", 2)
    assert_agree(history(tmp_path / "one", 1), two, rtol=2e-2)
    half = tmp_path / "half/checkpoints/step-00000002"
    shutil.copytree(tmp_path / "two/checkpoints/step-00000002", half)
    alone("tokenizer", tmp_path / "half")
    resumed = history(tmp_path / "half", 1)
    assert [h["step"] for h in resumed] == [3, 4]
    assert resumed[0]["loss"] == pytest.approx(two[2]["loss"], rel=1e-5)


def assert_transformers_agree(tmp_path):
    assert_agree(history(tmp_path / "one", 1), history(tmp_path / "two", 2), rtol=1e-3)
    shards = [sorted((tmp_path / n / "tokens").glob("*.safetensors")) for n in ("one", "two")]
    ids = [torch.cat([load_file(p)["ids"] for p in files]) for files in shards]
    assert torch.equal(*ids)


def test_transformer_training_and_its_token_shards_agree(tmp_path):
    for name in ("one", "two"):
        save_tokenizer(tmp_path / name / "tokenizer")
    alone("transformer", tmp_path / "one")
    fork("transformer", tmp_path / "two")
    assert_transformers_agree(tmp_path)


def test_maskvit_trains_alike(tmp_path):
    for name in ("one", "two"):
        save_tokenizer(tmp_path / name / "tokenizer", FRAME_MODEL)
    alone("maskvit", tmp_path / "one")
    fork("maskvit", tmp_path / "two")
    assert_transformers_agree(tmp_path)


def test_several_tasks_train_alike(tmp_path):
    for name in ("one", "two"):
        save_tokenizer(tmp_path / name / "tokenizer")
    alone("multitask", tmp_path / "one")
    fork("multitask", tmp_path / "two")
    assert_transformers_agree(tmp_path)
    assert any("/" in name for name in history(tmp_path / "two", 2)[0])


def test_sharded_weights_train_alike_and_go_on_unsharded(tmp_path):
    """FSDP2: losses, gathered checkpoints and the stored model are those of whole weights."""
    for name in ("one", "two"):
        save_tokenizer(tmp_path / name / "tokenizer")
    alone("transformer", tmp_path / "one")
    fork("sharded", tmp_path / "two")
    assert_transformers_agree(tmp_path)
    one, two = (tmp_path / n / "transformer/model.safetensors" for n in ("one", "two"))
    for name, value in load_file(one).items():
        torch.testing.assert_close(load_file(two)[name], value, rtol=1e-3, atol=1e-3)
    shutil.rmtree(tmp_path / "two/checkpoints/step-00000004")
    whole = history(tmp_path / "two", 2)
    alone("transformer", tmp_path / "two")
    assert history(tmp_path / "two", 1)[0]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-5)
    fork("sharded", tmp_path / "two")  # and back: nothing left to do, the state loads


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers(tmp_path, launcher):
    for name in ("one", "two"):
        save_tokenizer(tmp_path / name / "tokenizer")
    alone("transformer", tmp_path / "one")
    launch(launcher, "transformer", tmp_path / "two")
    assert_transformers_agree(tmp_path)
