"""One model for several tasks, the prefix condition and the autoregressive baseline, end to end."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import SCENES, transformer_recipe, write_scene

import magvit_fast as mf
from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import TokenClips, TokenHeader
from magvit_fast.errors import FileFormatError
from magvit_fast.models import (
    AutoregressiveTransformer,
    MagvitConfig,
    MagvitTokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)
from magvit_fast.tasks import TASKS, ClipGeometry, task_sequence
from magvit_fast.training.config import DataConfig, TaskConfig, TokensConfig, TransformerTraining
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.sources import open_clips
from magvit_fast.training.transformer_loop import (
    TransformerTrainer,
    tasks_of,
    train_transformer,
)

MODEL = MagvitConfig(
    filters=8, channel_multipliers=(1, 2), temporal_downsample=(True,), num_res_blocks=1,
    norm_groups=4, codebook_size=16, embedding_dim=4,
)  # fmt: skip
CLIPS = dataclasses.replace(SCENES, frames=4, size=16)  # -> 2 x 8 x 8 tokens
GEOMETRY = ClipGeometry(4, 16, 16, (2, 8, 8), causal=False)
PROMPTS = (
    "full_generation", "frame_prediction", "frame_interpolation", "outpainting", "inpainting",
)  # fmt: skip
SHAPE = MaskedTransformerConfig(
    hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(2, 8, 8), num_subtokens=1,
    subtoken_size=16,
)  # fmt: skip
# What a clip's tokens are conditioned on, by the name of the condition.
CONDITIONS = {
    "first1", "first1_last1", "outpainting_central", "outpainting_vertical",
    "outpainting_horizontal", "outpainting_dynamic", "inpainting_central", "inpainting_dynamic",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    MagvitTokenizer(MODEL).save_pretrained(folder)
    return folder


def recipe(folder: Path, tokenizer: Path, **changes: Any) -> TransformerTraining:
    return transformer_recipe(folder, tokenizer, **{"data": CLIPS, "model": SHAPE, **changes})


def labeled_clips(folder: Path) -> DataConfig:
    """Three videos of two classes."""
    for seed, name in enumerate(("cat/a.mp4", "dog/b.mp4", "dog/c.mp4")):
        write_scene(folder / "videos" / name, seed, 6)
    return dataclasses.replace(CLIPS, source="videos", path=str(folder / "videos"), labels=True)


def test_all_ten_tasks_in_one_model(tmp_path: Path, tokenizer: Path) -> None:
    data = labeled_clips(tmp_path)
    stage = recipe(
        tmp_path, tokenizer, data=data, steps=40, batch_size=3, log_every=40, checkpoint_every=40,
        model=dataclasses.replace(SHAPE, prompts=PROMPTS, num_classes=2),
        task=TaskConfig(names=tuple(TASKS)),
    )  # fmt: skip
    result = train_transformer(stage, progress=False)
    # one line of the log: the last step's scalars, and those of every task that was drawn
    sequence = task_sequence((1.0,) * 10, stage.run.seed)[:40]
    drawn = {list(TASKS)[n] for n in sequence}
    log = result.history[0]
    assert {name.split("/")[0] for name in log if "/" in name} == drawn
    for name in drawn:
        parts = [log[f"{name}/loss_{part}"] for part in ("refine", "mask", "reconstruct")]
        assert sum(parts) == pytest.approx(log[f"{name}/loss"], rel=1e-4)
        assert 0 < log[f"{name}/share_masked"] + log[f"{name}/share_refined"] <= 1
        assert TASKS[name].has_condition or log[f"{name}/loss_refine"] == 0
    assert sum(log[f"{name}/loss_refine"] > 0 for name in drawn) >= 6  # a step may select no other
    # the shards hold the condition tokens of each, class-conditional frame prediction's once
    item = TokenClips(tmp_path / "tokens")[Draw(0, 1)]
    assert {k.partition(".")[2] for k in item if k.startswith("condition_ids.")} == CONDITIONS
    model, video = MagvitTokenizer.from_pretrained(tokenizer), open_clips(data, 0)[Draw(0, 1)]
    for task in TASKS.values():
        if task.has_condition:
            padded = task.condition_video(video["video"][None], GEOMETRY)
            stored = item[f"condition_ids.{task.condition_name(GEOMETRY)}"]
            assert torch.equal(stored, model.encode(padded)[0]), task.name
    # and the model decodes each of them
    transformer = MaskedTransformer.from_pretrained(result.output)
    for name, task in TASKS.items():
        out = mf.generate(
            model, transformer, task=name, steps=2,
            video=video["video"][None] if task.has_condition else None,
            class_id=1 if task.class_conditional else None,
        )  # fmt: skip
        assert out.shape == (1, 3, 4, 16, 16)


def test_the_steps_follow_the_sequence(tmp_path: Path, tokenizer: Path) -> None:
    """Each step is for the task that the sequence says: its prompt, its region, its condition."""
    names = ("inpainting_central", "frame_prediction", "class_generation")
    stage = recipe(
        tmp_path, tokenizer, model=dataclasses.replace(SHAPE, prompts=PROMPTS, num_classes=2),
        task=TaskConfig(names=names, weights=(1.0, 2.0, 0.5)),
    )  # fmt: skip
    header = TokenHeader("", 4, (2, 8, 8), (4, 16, 16))
    trainer = TransformerTrainer(
        new_accelerator(stage.run), stage, tasks_of(stage.task), header, 2, causal=False
    )
    assert Counter(trainer.sequence) == {0: 200, 1: 400, 2: 100}
    assert [PROMPTS[row] for row in trainer.prompt_ids if row is not None] == [
        "inpainting", "frame_prediction", "full_generation",
    ]  # fmt: skip
    ids = torch.randint(0, 8, (2, 2, 8, 8))
    batch = {
        "ids": ids,
        "condition_ids.inpainting_central": ids + 8,
        "condition_ids.first1": (ids + 1) % 8 + 8,
        "class_ids": torch.tensor([0, 1]),
    }
    seen: set[int] = set()
    for step in range(700, 720):  # the sequence begins again
        number = trainer.sequence[step - 700]
        seen.add(number)
        masked, classes = trainer._corrupt(batch, ids.flatten(1), step, 0)
        refined = masked.tokens >= 8
        region = TASKS[names[number]].token_mask(GEOMETRY).flatten()
        assert not (refined & ~region).any()
        assert not (masked.mask & region).any()
        if number < 2:
            assert refined.any()
            key = list(batch)[1 + number]
            assert torch.equal(masked.tokens[refined], batch[key].flatten(1)[refined])
        assert (classes is None) == (number < 2)
    assert seen == {0, 1, 2}


def test_resuming_continues_exactly(tmp_path: Path, tokenizer: Path) -> None:
    tokens = TokensConfig(str(tmp_path / "tokens"), shard_size=3)
    task = TaskConfig(names=("frame_prediction", "outpainting_vertical", "inpainting_dynamic"))

    def stage(folder: str) -> TransformerTraining:
        return recipe(
            tmp_path / folder, tokenizer, tokens=tokens, task=task, steps=6, checkpoint_every=3,
            model=dataclasses.replace(SHAPE, prompts=PROMPTS),
        )  # fmt: skip

    straight = train_transformer(stage("a"), progress=False)
    shutil.copytree(
        tmp_path / "a/checkpoints/step-00000003", tmp_path / "b/checkpoints/step-00000003"
    )
    torch.manual_seed(99)
    resumed = train_transformer(stage("b"), progress=False)
    assert resumed.history == straight.history[3:]
    ours, theirs = (
        load_file(tmp_path / n / "checkpoints/step-00000006/model.safetensors") for n in "ab"
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_parts_that_count_are_chosen(tmp_path: Path, tokenizer: Path) -> None:
    """Table 5: the loss of masked positions alone, and with those to be reconstructed."""
    header = TokenHeader("", 4, (2, 8, 8), (4, 16, 16))
    ids = torch.randint(0, 16, (2, 2, 8, 8))
    batch = {"ids": ids, "condition_ids.first1": ids ^ 1}
    found = {}
    for parts in (("mask",), ("mask", "reconstruct"), ("reconstruct", "refine", "mask")):
        stage = recipe(
            tmp_path, tokenizer, model=dataclasses.replace(SHAPE, dropout=0.0),
            task=TaskConfig(given_frames=1, loss_on=parts),  # type: ignore[arg-type]
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = TransformerTrainer(
            new_accelerator(stage.run), stage, tasks_of(stage.task), header, causal=False
        )
        on_device = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
        values = {
            k: float(v.detach()) for k, v in trainer.forward_backward(on_device, 0, 0).items()
        }
        shares = {
            "mask": values["share_masked"], "refine": values["share_refined"],
            "reconstruct": 1 - values["share_masked"] - values["share_refined"],
        }  # fmt: skip
        counted = sum(values[f"loss_{part}"] for part in parts)
        assert values["loss"] == pytest.approx(counted / sum(shares[p] for p in parts), rel=1e-4)
        found[parts] = [values[f"loss_{part}"] for part in shares]
    first, *others = found.values()
    assert all(values == pytest.approx(first) for values in others)  # logged alike
    with pytest.raises(ValueError, match="loss_on: expected some of reconstruct, refine, mask"):
        TaskConfig(loss_on=())


@pytest.mark.parametrize("prompts", [(), PROMPTS])
def test_prefix_condition(tmp_path: Path, tokenizer: Path, prompts: tuple[str, ...]) -> None:
    stage = recipe(
        tmp_path, tokenizer, steps=2, task=TaskConfig(given_frames=1, condition_mode="prefix"),
        model=dataclasses.replace(SHAPE, condition_tokens=64, prompts=prompts),
    )  # fmt: skip
    result = train_transformer(stage, progress=False)
    assert result.history[0]["loss_refine"] == 0  # no token is inside a region
    transformer = MaskedTransformer.from_pretrained(result.output)
    assert transformer.config.prefix_length == 1 + bool(prompts) + 64 + 1
    model = MagvitTokenizer.from_pretrained(tokenizer)
    video = open_clips(CLIPS, 0)[Draw(0, 5)]["video"][None]
    seen: list[torch.Tensor] = []
    transformer.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.extend((args[1], kwargs["condition"])), with_kwargs=True
    )
    mf.generate(model, transformer, task="frame_prediction", video=video, steps=2)
    padded = TASKS["frame_prediction"].condition_video(video, GEOMETRY)
    assert seen[0].all()  # every latent is masked at the start
    assert torch.equal(seen[1], model.encode(padded).flatten(1)[:, :64])
    with pytest.raises(ValueError, match=r"prefix holds 64 condition tokens, but .* has 128"):
        mf.generate(model, transformer, task="frame_interpolation", video=video)


@pytest.mark.parametrize("name", ["frame_prediction", "class_generation"])
def test_the_autoregressive_baseline_learns(tmp_path: Path, tokenizer: Path, name: str) -> None:
    conditional = TASKS[name].has_condition
    data = dataclasses.replace(CLIPS, scenes=4) if conditional else labeled_clips(tmp_path)
    prefix = {"condition_tokens": 64} if conditional else {"num_classes": 2}
    model = dataclasses.replace(SHAPE, hidden_size=32, dropout=0.0, **prefix)
    stage = recipe(
        tmp_path, tokenizer, data=data, model=model, objective="autoregressive", steps=50,
        log_every=10, batch_size=3, task=TaskConfig(name, condition_mode="prefix" if conditional else "commit"),
    )  # fmt: skip
    optimizer = dataclasses.replace(stage.optimizer, learning_rate=1e-2)
    result = train_transformer(dataclasses.replace(stage, optimizer=optimizer), progress=False)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.8 * first["loss"]
    assert set(last) == {"step", "loss", "accuracy", "gradient_norm", "learning_rate"}
    transformer = AutoregressiveTransformer.from_pretrained(result.output)
    item = TokenClips(tmp_path / "tokens")[Draw(0, 0)]
    ids = item["ids"].view(1, -1)
    given = item["condition_ids.first1"].view(1, -1)[:, :64] if conditional else None
    classes = None if conditional else item["class_ids"].view(1)
    with torch.no_grad():
        logits = transformer(ids, condition=given, class_id=classes)
    nats = torch.nn.functional.cross_entropy(logits[0, :, 0], ids[0])
    assert nats.item() < first["loss"]


def test_mismatches_are_named(tmp_path: Path, tokenizer: Path) -> None:
    train_transformer(recipe(tmp_path, tokenizer, steps=1), progress=False)
    with pytest.raises(
        FileFormatError, match=r"no condition tokens of inpainting_central \(it was"
    ):
        train_transformer(
            recipe(tmp_path, tokenizer, steps=1, task=TaskConfig("inpainting_central")),
            progress=False,
        )
    with pytest.raises(ValueError, match=r"data\.labels: task class_generation needs classes"):
        train_transformer(
            recipe(tmp_path, tokenizer, steps=1, task=TaskConfig("class_generation")),
            progress=False,
        )
    both = ("frame_prediction", "inpainting_central")
    with pytest.raises(ValueError, match=r"model\.prompts: expected rows for the 2 tasks"):
        recipe(tmp_path, tokenizer, task=TaskConfig(names=both))
    with pytest.raises(ValueError, match="expected 'prefix', the only condition of an autoregress"):
        recipe(tmp_path, tokenizer, objective="autoregressive")
    with pytest.raises(ValueError, match=r"condition_tokens: expected .*, got 0 with 'prefix'"):
        recipe(tmp_path, tokenizer, task=TaskConfig(condition_mode="prefix"))
    prefix = dataclasses.replace(SHAPE, condition_tokens=60)
    with pytest.raises(ValueError, match=r"condition_tokens: expected .*, got 60 with 'commit'"):
        recipe(tmp_path, tokenizer, model=prefix)
    stage = recipe(
        tmp_path / "p", tokenizer, steps=1, model=prefix,
        task=TaskConfig(given_frames=1, condition_mode="prefix"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected 64, the condition region of task frame_predict"):
        train_transformer(stage, progress=False)
    for change, message in (
        ({"names": ("fly",)}, "names: expected one of frame_prediction"),
        ({"names": ("class_generation",) * 2}, "names: expected each task once"),
        ({"names": both, "weights": (1.0,)}, "weights: expected 2 positive numbers"),
        ({"names": both, "weights": (1.0, 0.0)}, "weights: expected 2 positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskConfig(**change)  # type: ignore[arg-type]
    three = tasks_of(TaskConfig(names=(*both, "frame_interpolation"), given_frames=2))
    assert [getattr(task, "first", None) for task in three] == [2, None, 1]
