"""Checkpoints are whole or absent, and belong to one recipe."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from magvit_fast.errors import FileFormatError, FileWriteError
from magvit_fast.training import checkpoints
from magvit_fast.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint

RECIPE = {"run": {"steps": 9, "output": "a", "seed": 0}, "model": {"filters": 8}}


def one_process(scaler=None):
    return SimpleNamespace(is_main_process=True, scaler=scaler, wait_for_everyone=lambda: None)


def network(seed: int):
    """Two modules, an average that the optimizer does not know, and one step behind them."""
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2), "ema": nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(
        [
            {"params": modules["a"].parameters(), "weight_decay": 0.1},
            {"params": modules["b"].parameters()},
        ],
        lr=0.1,
        betas=(0.0, 0.99),
    )
    step(modules, optimizer)
    return modules, optimizer


def step(modules, optimizer):
    optimizer.zero_grad()
    modules["b"](modules["a"](torch.ones(1, 3))).square().sum().backward()
    optimizer.step()


def save(folder, number, seed=0, recipe=RECIPE, keep=3, scaler=None):
    modules, optimizer = network(seed)
    path = save_checkpoint(
        one_process(scaler),
        folder,
        number,
        modules=modules,
        optimizer=optimizer,
        recipe=recipe,
        keep=keep,
    )
    return path, modules, optimizer


def load(path, seed=1, recipe=RECIPE, scaler=None):
    modules, optimizer = network(seed)
    number = load_checkpoint(
        one_process(scaler), path, modules=modules, optimizer=optimizer, recipe=recipe
    )
    return number, modules, optimizer


def test_everything_comes_back_and_goes_on_alike(tmp_path):
    path, modules, optimizer = save(tmp_path, 7)
    number, loaded, other = load(path)
    assert number == 7
    for again in range(3):
        for name, value in modules.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), (again, name)
        step(modules, optimizer)
        step(loaded, other)
    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "training.json",
    ]


def test_the_gradient_scaler_comes_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.ones(1))
    scaler.update(512.0)
    path, *_ = save(tmp_path, 1, scaler=scaler)
    other = torch.amp.GradScaler("cpu")
    load(path, scaler=other)
    assert other.state_dict() == scaler.state_dict()


def test_only_the_newest_are_kept(tmp_path):
    for number in (2, 4, 10, 8):
        save(tmp_path, number, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000008", "step-00000010"]
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "training.json"])
def test_failure_in_the_middle_leaves_the_previous_one(tmp_path, monkeypatch, file):
    save(tmp_path, 1)

    def full(content, path, *args):
        if str(path).endswith(file):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(content, path)

    real = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", full)
    monkeypatch.setattr(
        checkpoints,
        "atomic_write_text",
        lambda path, text: full({}, path) if file in str(path) else 0,
    )
    with pytest.raises(FileWriteError, match="step-00000002"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path).name == "step-00000001"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from magvit_fast.training import checkpoints
from tests.training.test_checkpoints import save
folder = Path({folder!r})
save(folder, 1)
def killed(state, path):
    path.write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save_file = killed
save(folder, 2)
"""


def test_a_kill_in_the_middle_leaves_the_previous_one(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    code = KILLED.format(root=root, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the half-written one under its hidden name
    path = latest_checkpoint(tmp_path)
    assert path.name == "step-00000001"
    assert load(path)[0] == 1
    save(tmp_path, 2)  # the next checkpoint clears the leftover away
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_another_recipe_is_refused_with_the_keys(tmp_path):
    path, *_ = save(tmp_path, 1)
    other = {"run": {"steps": 10, "output": "b", "seed": 0}, "model": {"filters": 9}}
    with pytest.raises(FileFormatError, match="another recipe") as caught:
        load(path, recipe=other)
    assert "model.filters: 8 there, 9 now" in str(caught.value)
    assert "run.steps: 9 there, 10 now" in str(caught.value)
    assert "output:" not in str(caught.value)  # may change
    moved = {"run": {"steps": 9, "output": "b", "seed": 0}, "model": {"filters": 8}}
    assert load(path, recipe=moved)[0] == 1


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_damage_is_one_clear_error(tmp_path, file, damage):
    path, *_ = save(tmp_path, 1)
    target = path / file
    data = target.read_bytes()
    if damage == "cut":
        target.write_bytes(data[: len(data) // 2])
    elif damage == "gone":
        target.unlink()
    else:
        target.write_bytes(json.dumps({"format": "other"}).encode())
    with pytest.raises(FileFormatError, match=r"step-00000001: .*delete this folder"):
        load(path)


def test_recipes_are_compared_as_they_are_stored(tmp_path):
    @dataclasses.dataclass
    class Recipe:
        betas: tuple[float, float] = (0.0, 0.99)

    recipe = dataclasses.asdict(Recipe())
    path, *_ = save(tmp_path, 1, recipe=recipe)
    assert load(path, recipe=recipe)[0] == 1
