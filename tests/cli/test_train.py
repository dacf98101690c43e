"""train: the recipes reach the two stages and their results come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.training.tiny import write_scene

from magvit_fast.models import (
    FrameTokenizer,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskViTTransformer,
)
from magvit_fast.training import TrainingResult

pytest.importorskip("accelerate")

TOKENIZER = """
[run]
output = "{folder}/one"
steps = 1
batch_size = 1
workers = 0
tensorboard = false

[data]
source = "scenes"
scenes = 2
frames = 5
size = 16

[model]
filters = 8
channel_multipliers = [1, 1]
temporal_downsample = [true]
num_res_blocks = 1
num_bits = 6

[discriminator]
filters = 4
channel_multipliers = [2]
"""
TRANSFORMER = """
tokenizer = "{folder}/one/tokenizer"

[run]
output = "{folder}/two"
steps = 2
batch_size = 1
workers = 0
tensorboard = false

[data]
source = "scenes"
scenes = 2
frames = 9
size = 16

[tokens]
path = "{folder}/tokens"

[model]
hidden_size = 16
num_layers = 1
num_heads = 2
mlp_size = 32
grid = [5, 8, 8]
num_subtokens = 2
subtoken_size = 8
"""


def _recipe(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text.format(folder=folder))
    return path


def test_both_stages(cli: Callable, tmp_path: Path) -> None:
    one = cli("train", "tokenizer", _recipe(tmp_path, "one", TOKENIZER), "--json")
    assert one.status == 0, one.err
    facts = json.loads(one.out)
    assert facts["steps"] == 1
    assert Path(facts["output"]) == tmp_path / "one" / "tokenizer"
    assert facts["last"]["step"] == 1
    MagvitV2Tokenizer.from_pretrained(facts["output"])

    two = cli("train", "transformer", _recipe(tmp_path, "two", TRANSFORMER), "--device", "cpu")
    assert two.status == 0, two.err
    assert str(tmp_path / "two" / "transformer") in two.out
    MaskedTransformer.from_pretrained(tmp_path / "two" / "transformer")


def test_bad_recipes(fails: Callable, tmp_path: Path) -> None:
    assert "none.toml" in fails("train", "tokenizer", tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("[run\n")
    assert str(path) in fails("train", "tokenizer", path)
    path.write_text('[run]\noutput = "x"\nsteps = 1\nbatch_size = 1\nspeed = 9\n')
    assert "speed" in fails("train", "tokenizer", path)
    assert "invalid choice" in fails("train", "decoder", path, status=2)


def test_only_the_first_process_speaks(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = TrainingResult(tmp_path, 1)
    monkeypatch.setattr("magvit_fast.training.train_tokenizer", lambda recipe: result)
    path = _recipe(tmp_path, "one", TOKENIZER)
    assert cli("train", "tokenizer", path).out != ""
    monkeypatch.setenv("RANK", "1")
    assert cli("train", "tokenizer", path).out == ""


def test_devices(fails: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    path = _recipe(tmp_path, "one", TOKENIZER)
    line = fails("train", "tokenizer", path, "--device", "cuda:1")
    assert "CUDA_VISIBLE_DEVICES" in line


MASKVIT = """
tokenizer = "{folder}/one/tokenizer"

[run]
output = "{folder}/three"
steps = 2
batch_size = 2
workers = 0
tensorboard = false

[data]
path = "{folder}/robot"
frames = 3
size = 16
flip = false
actions = true

[tokens]
path = "{folder}/robot-tokens"

[model]
system = "maskvit"
frames = 3
grid = [4, 4]
codebook_size = 16
action_dim = 2
hidden_size = 16
num_blocks = 1
num_heads = 2
mlp_size = 32
window = [2, 2]

[task]
goal = true
"""
FRAMES = """
[run]
output = "{folder}/one"
steps = 1
batch_size = 1
workers = 0
tensorboard = false

[data]
path = "{folder}/robot"
frames = 2
size = 16

[model]
system = "maskvit"
filters = 8
channel_multipliers = [1, 1, 1]
num_res_blocks = 1
codebook_size = 16
embedding_dim = 4

[discriminator]
frame_by_frame = true
clip = [1, 16, 16]
filters = 4
channel_multipliers = [2]
"""


def test_both_stages_of_maskvit_with_actions(cli: Callable, tmp_path: Path) -> None:
    for seed in range(2):
        write_scene(tmp_path / f"robot/{seed}.mp4", seed, 4, 16)
        np.save(tmp_path / f"robot/{seed}.npy", np.full((4, 2), 0.5 * seed))
    for stage, name, text in (
        ("tokenizer", "one", FRAMES),
        ("transformer", "three", MASKVIT),
    ):
        done = cli("train", stage, _recipe(tmp_path, name, text), "--json")
        assert done.status == 0, done.err
        assert Path(json.loads(done.out)["output"]) == tmp_path / name / stage
    FrameTokenizer.from_pretrained(tmp_path / "one" / "tokenizer")
    model = MaskViTTransformer.from_pretrained(tmp_path / "three" / "transformer")
    assert model.config.action_dim == 2
