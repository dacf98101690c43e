"""Stage two: token shards, COMMIT batches, resuming."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import MODEL, SCENES, save_tokenizer, transformer_recipe, write_scene
from torch import nn

from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import TokenClips
from magvit_fast.errors import FileFormatError
from magvit_fast.models.magvit_v2 import MagvitV2Tokenizer
from magvit_fast.models.masked_transformer import MaskedTransformer
from magvit_fast.tasks import ClipGeometry, get_task
from magvit_fast.training.config import TaskConfig, TokensConfig
from magvit_fast.training.network import weight_decay_groups
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.sources import open_clips
from magvit_fast.training.tokenization import condition_differs
from magvit_fast.training.transformer_loop import (
    TransformerTrainer,
    tasks_of,
    train_transformer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


def test_shards_hold_the_tokens_of_the_clips(tmp_path, tokenizer):
    recipe = transformer_recipe(tmp_path, tokenizer, steps=1)
    train_transformer(recipe, progress=False)
    tokens = TokenClips(tmp_path / "tokens")
    model = MagvitV2Tokenizer.from_pretrained(tokenizer)
    clips = open_clips(recipe.data, 0)
    assert tokens.num_clips == clips.num_clips == 8
    for i in (0, 4, 7):
        item = tokens[Draw(0, i)]
        expected = model.encode(clips[Draw(0, i)]["video"][None])[0]
        assert torch.equal(item["ids"], expected)
        assert set(item) == {"ids"}  # 3 given frames fill slots 0 and 1: z~ is z there
    files = sorted(p.name for p in (tmp_path / "tokens").glob("*.safetensors"))
    assert len(files) == 3


def test_condition_tokens_are_stored_where_they_differ(tmp_path, tokenizer):
    recipe = transformer_recipe(tmp_path, tokenizer, steps=1, task=TaskConfig(given_frames=2))
    train_transformer(recipe, progress=False)
    item = TokenClips(tmp_path / "tokens")[Draw(0, 3)]
    model = MagvitV2Tokenizer.from_pretrained(tokenizer)
    video = open_clips(recipe.data, 0)[Draw(0, 3)]["video"][None]
    repeated = video[:, :, [0, 1, 1, 1, 1]]
    assert torch.equal(item["condition_ids.first2"], model.encode(repeated)[0])


def test_norms_over_the_clip_make_condition_tokens_differ(tmp_path):
    """Tokens of the true clip would tell of the future (Open-MAGVIT2's video tokenizers)."""
    model = dataclasses.replace(MODEL, clip_norms=True)
    folder = save_tokenizer(tmp_path / "tokenizer", model)
    recipe = transformer_recipe(tmp_path, folder, steps=1)
    train_transformer(recipe, progress=False)
    item = TokenClips(tmp_path / "tokens")[Draw(0, 3)]
    video = open_clips(recipe.data, 0)[Draw(0, 3)]["video"][None]
    expected = MagvitV2Tokenizer.from_pretrained(folder).encode(video[:, :, [0, 1, 2, 2, 2]])[0]
    assert torch.equal(item["condition_ids.first3"], expected)
    assert not torch.equal(item["ids"][:2], expected[:2])


def test_interrupted_tokenization_is_taken_up_again(tmp_path, tokenizer, monkeypatch):
    recipe = transformer_recipe(tmp_path, tokenizer, steps=1)
    encode, calls = MagvitV2Tokenizer.encode, []

    def counted(self, video):
        calls.append(len(video))
        if sum(calls) > 6 and len(calls) == 5:  # in the third shard
            raise KeyboardInterrupt
        return encode(self, video)

    monkeypatch.setattr(MagvitV2Tokenizer, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(recipe, progress=False)
    assert calls == [2, 1, 2, 1, 2]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "tokens").iterdir()}
    assert len(kept) == 2
    train_transformer(recipe, progress=False)
    assert calls == [2, 1, 2, 1, 2, 2]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    assert TokenClips(tmp_path / "tokens").num_clips == 8


@pytest.mark.parametrize(
    ("name", "given", "differs"),
    [
        ("frame_prediction", 0, False),
        ("frame_prediction", 9, False),
        ("frame_prediction", 6, True),
        ("class_frame_prediction", 1, False),
        ("frame_interpolation", 0, True),
        ("outpainting_central", 0, True),
        ("class_generation", 0, False),
    ],
)
def test_when_condition_tokens_differ(name, given, differs):
    geometry = ClipGeometry(17, 16, 16, (5, 4, 4), causal=True)
    (task,) = tasks_of(TaskConfig(name=name, given_frames=given))
    assert condition_differs(task, geometry) is differs
    ahead = dataclasses.replace(geometry, looks_ahead=True)
    assert condition_differs(task, ahead) is task.has_condition


def trainer(tmp_path, tokenizer, *, ids=None, classes=0, **changes):
    recipe = transformer_recipe(tmp_path, tokenizer, **changes)
    from magvit_fast.data.tokens import TokenHeader

    header = TokenHeader("f", 6, (3, 4, 4), (5, 16, 16))
    torch.manual_seed(0)
    accelerator = new_accelerator(recipe.run)
    return TransformerTrainer(accelerator, recipe, tasks_of(recipe.task), header, classes)


def test_corruption_follows_the_condition(tmp_path, tokenizer):
    """Slots 0 and 1 may be replaced by condition tokens and are never masked; slot 2 the reverse."""
    one = trainer(tmp_path, tokenizer)
    ids = torch.randint(0, 64, (4, 3, 4, 4))
    batch = {"ids": ids, "condition_ids.first3": ids ^ 1}
    seen = torch.zeros(3, dtype=torch.bool)
    for step in range(20):
        masked, class_id = one._corrupt(batch, ids.flatten(1), step, 0)
        tokens, mask = masked.tokens.view_as(ids), masked.mask.view_as(ids)
        assert class_id is None
        assert not mask[:, :2].any()
        assert torch.equal(tokens[:, 2][~mask[:, 2]], ids[:, 2][~mask[:, 2]])
        replaced = tokens[:, :2] != ids[:, :2]
        assert torch.equal(tokens[:, :2][replaced], (ids ^ 1)[:, :2][replaced])
        seen |= torch.tensor([bool(replaced.any()), bool(mask.any()), bool((~mask[:, 2]).any())])
    assert seen.all()


def test_classes_are_dropped_at_the_rate_asked_for(tmp_path, tokenizer):
    model = dataclasses.replace(transformer_recipe(tmp_path, tokenizer).model, num_classes=5)
    task = TaskConfig("class_generation", class_drop=0.25)
    one = trainer(tmp_path, tokenizer, model=model, task=task, classes=5)
    ids = torch.randint(0, 64, (64, 3, 4, 4))
    batch = {"ids": ids, "class_ids": torch.arange(64) % 5}
    dropped = []
    for step in range(20):
        _, class_id = one._corrupt(batch, ids.flatten(1), step, 0)
        kept = class_id != 5
        assert torch.equal(class_id[kept], batch["class_ids"][kept])
        dropped.append((~kept).float().mean())
    assert 0.2 < float(torch.stack(dropped).mean()) < 0.3


def test_decay_is_for_matrices_of_linear_layers_only(tmp_path, tokenizer):
    model = MaskedTransformer(transformer_recipe(tmp_path, tokenizer).model)
    decayed, plain = weight_decay_groups(model, 0.045)
    names = {id(p): name for name, p in model.named_parameters()}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {names[id(p)] for p in decayed["params"]} == linear
    assert decayed["weight_decay"] == 0.045
    assert plain["weight_decay"] == 0.0
    assert {names[id(p)] for p in plain["params"]} == set(names.values()) - linear
    assert any("embedding" in names[id(p)] for p in plain["params"])


def test_resuming_continues_exactly(tmp_path, tokenizer):
    """With dropout: its random numbers too are those of the uninterrupted run."""
    settings = {"steps": 6, "checkpoint_every": 3, "gradient_accumulation": 2}
    tokens = TokensConfig(str(tmp_path / "tokens"), shard_size=3)

    def recipe(folder):
        return transformer_recipe(tmp_path / folder, tokenizer, tokens=tokens, **settings)

    straight = train_transformer(recipe("a"), progress=False)
    shutil.copytree(
        tmp_path / "a/checkpoints/step-00000003", tmp_path / "b/checkpoints/step-00000003"
    )
    torch.manual_seed(99)
    resumed = train_transformer(recipe("b"), progress=False)
    assert resumed.history == straight.history[3:]
    for file in ("model.safetensors", "optimizer.safetensors"):
        a = load_file(tmp_path / "a/checkpoints/step-00000006" / file)
        b = load_file(tmp_path / "b/checkpoints/step-00000006" / file)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_is_stored(tmp_path, tokenizer):
    recipe = transformer_recipe(tmp_path, tokenizer, steps=60, log_every=10)
    model = dataclasses.replace(recipe.model, dropout=0.0, hidden_size=32)
    optimizer = dataclasses.replace(recipe.optimizer, learning_rate=1e-2)
    recipe = dataclasses.replace(
        recipe, model=model, optimizer=optimizer, data=dataclasses.replace(SCENES, scenes=4)
    )
    result = train_transformer(recipe, progress=False)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    stored = MaskedTransformer.from_pretrained(result.output)
    state = load_file(tmp_path / "checkpoints/step-00000060/model.safetensors")
    for key, value in stored.state_dict().items():
        assert torch.equal(value, state[f"transformer.{key}"])


def test_class_tasks_read_labels_from_folders(tmp_path, tokenizer):
    for seed, name in enumerate(("cat/a.mp4", "dog/b.mp4", "dog/c.mp4")):
        write_scene(tmp_path / "videos" / name, seed, 6)
    recipe = transformer_recipe(tmp_path, tokenizer, steps=1, batch_size=3)
    data = dataclasses.replace(SCENES, source="videos", path=str(tmp_path / "videos"), labels=True)
    model = dataclasses.replace(recipe.model, num_classes=2)
    task = TaskConfig("class_frame_prediction", given_frames=3)
    recipe = dataclasses.replace(recipe, data=data, model=model, task=task)
    train_transformer(recipe, progress=False)
    tokens = TokenClips(tmp_path / "tokens")
    assert tokens.class_names == ("cat", "dog")
    assert [int(tokens[Draw(0, i)]["class_ids"]) for i in range(3)] == [0, 1, 1]
    with pytest.raises(ValueError, match=r"model\.num_classes: expected 2"):
        train_transformer(
            dataclasses.replace(recipe, model=dataclasses.replace(model, num_classes=3)),
            progress=False,
        )


def test_mismatches_are_named(tmp_path, tokenizer):
    recipe = transformer_recipe(tmp_path, tokenizer, steps=1)
    train_transformer(recipe, progress=False)
    wrong = dataclasses.replace(recipe.model, grid=(5, 4, 4))
    with pytest.raises(ValueError, match=r"model: expected grid \(3, 4, 4\) and 6 bits"):
        train_transformer(dataclasses.replace(recipe, model=wrong), progress=False)
    torch.manual_seed(1)
    MagvitV2Tokenizer(MagvitV2Tokenizer.from_pretrained(tokenizer).config).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(FileFormatError, match="made by another tokenizer"):
        train_transformer(
            dataclasses.replace(recipe, tokenizer=str(tmp_path / "other")), progress=False
        )
    with pytest.raises(ValueError, match="given_frames: task class_generation"):
        tasks_of(TaskConfig("class_generation", given_frames=3))
    assert tasks_of(TaskConfig()) == (get_task("frame_prediction"),)
