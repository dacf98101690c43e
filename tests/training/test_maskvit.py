"""MaskViT's two stages: frames as images; its masking rule, actions, goals, resuming."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import FRAME_CLIPS as CLIPS
from tests.training.tiny import FRAME_MODEL as FRAMES
from tests.training.tiny import MASKVIT as SHAPE
from tests.training.tiny import MODEL as V2
from tests.training.tiny import maskvit_recipe, save_tokenizer, tokenizer_recipe, write_scene

from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import TokenClips
from magvit_fast.errors import FileFormatError
from magvit_fast.models import (
    DiscriminatorConfig,
    FrameTokenizer,
    MagvitV2Tokenizer,
    MaskViTConfig,
    MaskViTTransformer,
    load_tokenizer,
)
from magvit_fast.training import MaskViTTraining, load_transformer_recipe, train_transformer
from magvit_fast.training.config import (
    DataConfig,
    TokensConfig,
    TransformerTraining,
)
from magvit_fast.training.maskvit_config import FutureConfig
from magvit_fast.training.maskvit_loop import MaskViTTrainer
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.sources import open_clips
from magvit_fast.training.tokenizer_loop import (
    TokenizerTrainer,
    frames_as_images,
    train_tokenizer,
)

JUDGE = DiscriminatorConfig(
    filters=4, channel_multipliers=(2, 2), pooling="average", frame_by_frame=True, clip=(1, 8, 8)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model", FRAMES)


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos with three numbers a frame."""
    folder = tmp_path_factory.mktemp("robot")
    for seed in range(4):
        write_scene(folder / f"{seed}.mp4", seed, 5, 16)
        np.save(folder / f"{seed}.npy", np.random.default_rng(seed).normal(size=(5, 3)))
    return folder


def test_the_tokenizer_is_trained_on_single_frames(tmp_path: Path) -> None:
    """Clips of two frames and twice as many images give the same losses, R1 included."""
    clips = torch.rand(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    values = []
    for frames, video in ((2, clips), (1, frames_as_images(clips))):
        data = dataclasses.replace(CLIPS, frames=frames)
        config = tokenizer_recipe(
            tmp_path / str(frames), data=data, model=FRAMES, discriminator=JUDGE
        )
        torch.manual_seed(1)
        trainer = TokenizerTrainer(new_accelerator(config.run), config)
        assert trainer.discriminator.config.clip == (1, 8, 8)
        values.append(trainer.forward_backward({"video": video}, 0, 0))
        assert all(p.grad is not None for p in trainer.networks.parameters())
    assert {"discriminator_r1", "adversarial", "psnr"} <= values[0].keys()
    torch.testing.assert_close(values[0], values[1])
    assert torch.equal(frames_as_images(clips)[3, :, 0], clips[1, :, 1])


def test_the_tokenizer_trains_and_is_stored(tmp_path: Path) -> None:
    config = tokenizer_recipe(
        tmp_path,
        data=CLIPS,
        model=FRAMES,
        discriminator=JUDGE,
        steps=30,
        log_every=10,
        batch_size=2,
    )
    result = train_tokenizer(config, progress=False)
    assert result.history[-1]["reconstruction"] < result.history[0]["reconstruction"]
    assert isinstance(load_tokenizer(result.output), FrameTokenizer)


def with_actions(robot: Path) -> DataConfig:
    return DataConfig(path=str(robot), frames=4, size=8, flip=False, actions=True)


def trainer(config: MaskViTTraining) -> MaskViTTrainer:
    torch.manual_seed(0)
    tokens = TokenClips(config.tokens.path)
    return MaskViTTrainer(new_accelerator(config.run), config, tokens)


def test_it_trains_is_stored_and_learns(tmp_path: Path, tokenizer: Path) -> None:
    data = dataclasses.replace(CLIPS, scenes=2)
    config = maskvit_recipe(tmp_path, tokenizer, steps=40, log_every=10, batch_size=2, data=data)
    result = train_transformer(config, progress=False)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    # one of four frames is given, and on average three quarters of the others are masked
    assert 0.3 < result.history[-1]["share_masked"] <= 0.75
    stored = MaskViTTransformer.from_pretrained(result.output)
    state = load_file(tmp_path / "checkpoints/step-00000040/model.safetensors")
    for key, value in stored.state_dict().items():
        assert torch.equal(value, state[f"transformer.{key}"])


@pytest.mark.parametrize("goal", [False, True])
def test_given_frames_stay_and_the_ratio_is_drawn_for_each_video(
    tmp_path: Path, tokenizer: Path, goal: bool
) -> None:
    config = maskvit_recipe(tmp_path, tokenizer, steps=1, task=FutureConfig(1, goal))
    train_transformer(config, progress=False)
    one = trainer(config)
    ids = torch.zeros(32, 4, 4, 4, dtype=torch.int64)
    future = (2 if goal else 3) * 16
    counts = []
    for step in range(4):
        unknown = one._mask(ids, step, 0)
        assert not unknown[:, 0].any()
        assert unknown[:, 3].any() != goal
        counts.append(unknown.flatten(1).sum(1))
        assert torch.equal(unknown, one._mask(ids, step, 0))
    every = torch.stack(counts)
    assert every.min() >= future // 2
    assert every.max() <= future
    assert 0.7 < every.float().mean() / future < 0.8
    assert len(every.flatten().unique()) > 10
    assert not torch.equal(counts[0], counts[1])


def test_a_fixed_ratio_is_the_ablation(tmp_path: Path, tokenizer: Path) -> None:
    config = maskvit_recipe(
        tmp_path, tokenizer, steps=2, task=FutureConfig(mask_ratio=(0.75, 0.75))
    )
    result = train_transformer(config, progress=False)
    shares = [h["share_masked"] for h in result.history]
    assert shares == [pytest.approx(0.75 * 0.75)] * 2


def test_actions_reach_the_model_with_their_clips(
    tmp_path: Path, tokenizer: Path, robot: Path
) -> None:
    shape = dataclasses.replace(SHAPE, action_dim=3)
    config = maskvit_recipe(tmp_path, tokenizer, steps=2, data=with_actions(robot), model=shape)
    result = train_transformer(config, progress=False)
    tokens, clips = TokenClips(config.tokens.path), open_clips(config.data, 0)
    model = load_tokenizer(tokenizer)
    for i in range(4):
        item, sample = tokens[Draw(0, i)], clips[Draw(0, i)]
        assert torch.equal(item["actions"], sample["actions"])
        assert torch.equal(item["ids"], model.encode(sample["video"][None])[0])
    trained = MaskViTTransformer.from_pretrained(result.output)
    start = trainer(config).model
    assert not torch.equal(trained.action_projection.weight, start.action_projection.weight)
    # the same tokens train a model without actions
    plain = maskvit_recipe(tmp_path / "plain", tokenizer, steps=1, data=with_actions(robot),
                   tokens=config.tokens)  # fmt: skip
    train_transformer(plain, progress=False)
    wide = dataclasses.replace(config, model=dataclasses.replace(shape, action_dim=5))
    with pytest.raises(ValueError, match=r"model\.action_dim: expected 3, the actions in .*got 5"):
        train_transformer(wide, progress=False)


def test_tokens_without_actions_are_refused(tmp_path: Path, tokenizer: Path, robot: Path) -> None:
    data = dataclasses.replace(with_actions(robot), actions=False)
    config = maskvit_recipe(tmp_path, tokenizer, steps=1, data=data)
    train_transformer(config, progress=False)
    acting = dataclasses.replace(
        config, data=with_actions(robot), model=dataclasses.replace(SHAPE, action_dim=3)
    )
    with pytest.raises(ValueError, match=r"tokens\.path: .* holds tokens without actions"):
        train_transformer(acting, progress=False)


def test_resuming_continues_exactly(tmp_path: Path, tokenizer: Path) -> None:
    """With dropout and accumulation: every random number is a function of the step."""
    settings: dict[str, Any] = {
        "steps": 4,
        "checkpoint_every": 2,
        "gradient_accumulation": 2,
        "model": dataclasses.replace(SHAPE, dropout=0.1),
        "tokens": TokensConfig(str(tmp_path / "tokens"), shard_size=3),
    }
    straight = train_transformer(
        maskvit_recipe(tmp_path / "a", tokenizer, **settings), progress=False
    )
    shutil.copytree(
        tmp_path / "a/checkpoints/step-00000002", tmp_path / "b/checkpoints/step-00000002"
    )
    torch.manual_seed(99)
    resumed = train_transformer(
        maskvit_recipe(tmp_path / "b", tokenizer, **settings), progress=False
    )
    assert resumed.history == straight.history[2:]
    a = load_file(tmp_path / "a/transformer/model.safetensors")
    b = load_file(tmp_path / "b/transformer/model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_share_of_a_batch_is_masked_as_in_the_whole(tmp_path: Path, tokenizer: Path) -> None:
    config = maskvit_recipe(tmp_path, tokenizer, steps=1)
    train_transformer(config, progress=False)
    one = trainer(config)
    ids = torch.zeros(4, 4, 4, 4, dtype=torch.int64)
    whole = one._mask(ids, 3, 1)
    shares = []
    for rank in range(2):
        one.accelerator = type(
            "Two", (), {"num_processes": 2, "process_index": rank}
        )  # all that _mask asks for
        shares.append(one._mask(ids[:2], 3, 1))
    assert torch.equal(torch.cat(shares), whole)


def test_mismatches_are_named(tmp_path: Path, tokenizer: Path, robot: Path) -> None:
    config = maskvit_recipe(tmp_path, tokenizer, steps=1)
    train_transformer(config, progress=False)
    wrong = dataclasses.replace(config, model=dataclasses.replace(SHAPE, codebook_size=32))
    with pytest.raises(ValueError, match=r"model: expected grid \(4, 4, 4\) and 4 bits.* 5 bits"):
        train_transformer(wrong, progress=False)
    wrong = dataclasses.replace(config, model=dataclasses.replace(SHAPE, grid=(8, 8)))
    with pytest.raises(ValueError, match=r"got grid \(4, 8, 8\)"):
        train_transformer(wrong, progress=False)
    MagvitV2Tokenizer(V2).save_pretrained(tmp_path / "v2")
    with pytest.raises(ValueError, match="tokenizer: expected one that makes tokens of single"):
        train_transformer(
            dataclasses.replace(config, tokenizer=str(tmp_path / "v2")), progress=False
        )
    for change, message in (
        ({"data": dataclasses.replace(CLIPS, frames=5)}, r"data\.frames: expected .* = 4.* got 5"),
        ({"data": dataclasses.replace(CLIPS, frames=3)}, r"data\.frames: expected .* = 4.* got 3"),
        ({"model": dataclasses.replace(SHAPE, action_dim=2)}, r"data\.actions: expected true"),
        ({"task": FutureConfig(4)}, r"task\.given_frames: expected"),
        ({"task": FutureConfig(3, goal=True)}, r"task\.given_frames: expected .* and a goal"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)
    for fields, message in (
        ({"mask_ratio": (0.9, 0.5)}, "mask_ratio: expected"),
        ({"given_frames": 0}, "given_frames: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FutureConfig(**fields)
    for change in ({"source": "scenes"}, {"flip": True}, {"strides": (2,)}):
        with pytest.raises(ValueError, match="actions: expected source 'videos'"):
            dataclasses.replace(with_actions(robot), **change)


def test_recipe_files_say_which_system_they_are_of(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    head = (
        'tokenizer = "t"\n[run]\noutput = "o"\nsteps = 1\nbatch_size = 1\n[tokens]\npath = "p"\n'
        '[data]\nsource = "scenes"\nframes = 16\n'
    )
    path.write_text(head + '[model]\nsystem = "maskvit"\npreset = "maskvit-large"\nwindow=[8, 8]\n')
    found = load_transformer_recipe(path)
    assert isinstance(found, MaskViTTraining)
    assert found.model == MaskViTConfig(hidden_size=1024, mlp_size=4096, window=(8, 8))
    assert (found.task.mask_ratio, found.optimizer.learning_rate) == ((0.5, 1.0), 3e-4)
    path.write_text(head)
    assert isinstance(load_transformer_recipe(path), TransformerTraining)
    path.write_text(head + '[model]\nsystem = "maskvit"\n[task]\nname = "frame_prediction"\n')
    with pytest.raises(FileFormatError, match=r"unknown key 'task\.name'; known are given_frames"):
        load_transformer_recipe(path)
    path.write_text(head + '[model]\nsystem = "vq"\n')
    with pytest.raises(FileFormatError, match=r"recipe\.toml: .*'model"):
        load_transformer_recipe(path)
