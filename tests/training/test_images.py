"""Images in stage one: tokenizers of images, inflation into video, and both in one training."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import (
    MODEL,
    SCENES,
    tokenizer_recipe,
    transformer_recipe,
    write_scene,
)

import magvit_fast as mf
from magvit_fast.data.order import BatchOrder, Draw
from magvit_fast.data.video import write_image
from magvit_fast.errors import FileFormatError
from magvit_fast.models import (
    DiscriminatorConfig,
    MagvitTokenizer,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)
from magvit_fast.models.magvit import MagvitConfig
from magvit_fast.training.config import DataConfig, TaskConfig
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.sources import open_clips
from magvit_fast.training.tokenizer_loop import TokenizerTrainer, train_tokenizer
from magvit_fast.training.transformer_loop import train_transformer

FLAT = dataclasses.replace(MODEL, frame_by_frame=True, temporal_downsample=(False, False))
JUDGE = DiscriminatorConfig((1, 16, 16), filters=4, channel_multipliers=(2, 2), frame_by_frame=True)


@pytest.fixture
def images(tmp_path):
    """Six images of two classes, each of one gray of its own (40, 60, ...)."""
    folder = tmp_path / "images"
    for i in range(6):
        pixels = torch.full((3, 24, 40), 40 + 20 * i, dtype=torch.uint8)
        path = folder / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, pixels)
    return folder


def test_images_beside_clips_with_actions_need_none(tmp_path, images):
    write_scene(tmp_path / "videos/a.mp4", 0, 5)
    np.save(tmp_path / "videos/a.npy", np.zeros((5, 2)))
    data = DataConfig(
        path=str(tmp_path / "videos"), image_path=str(images), image_ratio=0.5, frames=5, size=16,
        actions=True, flip=False,
    )  # fmt: skip
    source = open_clips(data, seed=0)
    assert source.num_stills == 6
    assert source[Draw(0, 0)]["actions"].shape == (5, 2)
    assert "actions" not in source[Draw(0, 0, still=True)]


def test_an_image_folder_trains_an_image_tokenizer(tmp_path, images):
    data = DataConfig(path=str(images), frames=1, size=16, labels=True)
    source = open_clips(data, seed=0)
    assert source.num_clips == 6
    assert source.class_names == ("cat", "dog")
    sample = source[Draw(0, 0)]
    assert sample["video"].shape == (3, 1, 16, 16)
    assert sample["class_id"] == 0
    assert sample["video"].flatten().numpy() == pytest.approx(60 / 255, abs=1e-6)
    recipe = tokenizer_recipe(tmp_path / "run", data=data, model=FLAT, discriminator=JUDGE, steps=2)
    result = train_tokenizer(recipe, progress=False)
    assert len(result.history) == 2
    assert result.history[0]["discriminator_r1"] >= 0
    stored = MagvitV2Tokenizer.from_pretrained(result.output)
    assert stored.encode(sample["video"][None]).shape == (1, 1, 4, 4)


def test_classes_of_images_end_to_end(tmp_path, images):
    """Image folder -> tokenizer -> token shards with labels -> two-head transformer -> an image."""
    data = DataConfig(path=str(images), frames=1, size=16, labels=True)
    recipe = tokenizer_recipe(tmp_path / "a", data=data, model=FLAT, discriminator=JUDGE, steps=1)
    folder = train_tokenizer(recipe, progress=False).output
    model = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(1, 4, 4), subtoken_size=8,
        num_classes=2,
    )  # fmt: skip
    task = TaskConfig("class_generation", class_drop=0.5)
    second = transformer_recipe(
        tmp_path / "b", folder, data=data, model=model, task=task, steps=2, batch_size=4
    )
    result = train_transformer(second, progress=False)
    for values in result.history:
        heads = values["loss_subtoken_0"] + values["loss_subtoken_1"]
        assert heads == pytest.approx(values["loss"], rel=1e-5)
    image = mf.generate(
        MagvitV2Tokenizer.from_pretrained(folder),
        MaskedTransformer.from_pretrained(result.output),
        task="class_generation",
        class_id=[0, 1],
        **mf.decoding.published("magvit-v2-image-256-guided", steps=4),
    )
    assert image.shape == (2, 3, 1, 16, 16)
    assert image.isfinite().all()


def test_images_of_one_folder_and_clips_of_another_in_one_training(tmp_path, images):
    """Half of the batches are single images; they come from image_path alone."""
    for seed in range(2):
        write_scene(tmp_path / f"videos/{seed}.mp4", seed, frames=9)
    data = DataConfig(
        path=str(tmp_path / "videos"), image_path=str(images), image_ratio=0.5,
        frames=5, size=16, flip=False,
    )  # fmt: skip
    source = open_clips(data, seed=0)
    assert (source.num_clips, source.num_stills) == (2, 6)
    grays = {round(255 * float(source[Draw(0, i, still=True)]["video"].mean())) for i in range(6)}
    assert grays == {40, 60, 80, 100, 120, 140}
    assert source[Draw(0, 0)]["video"].shape == (3, 5, 16, 16)
    order = BatchOrder(2, 4, num_stills=6, still_ratio=0.5)
    assert [order.batch(n)[0].still for n in range(6)] == [False, True] * 3
    recipe = tokenizer_recipe(tmp_path / "run", data=data, steps=4)
    history = train_tokenizer(recipe, progress=False).history
    assert len(history) == 4
    assert all(np.isfinite(h["loss"]) for h in history)


def test_images_that_no_batch_takes():
    with pytest.raises(
        ValueError, match="image_path: no batch takes images while image_ratio is 0"
    ):
        DataConfig(path="videos", image_path="images")


def test_a_run_starts_from_the_inflated_image_tokenizer(tmp_path, caplog):
    torch.manual_seed(3)
    flat = MagvitV2Tokenizer(FLAT)
    flat.save_pretrained(tmp_path / "image")
    recipe = tokenizer_recipe(tmp_path / "run", init_from=str(tmp_path / "image"), steps=2)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "magvit_fast.training"):
        trainer = TokenizerTrainer(new_accelerator(recipe.run), recipe)
    assert "left as they are" not in caplog.text
    image = torch.rand(1, 3, 1, 16, 16)
    with torch.no_grad():
        expected = flat.eval()(image)
        for model in (trainer.tokenizer, trainer.ema.model):  # the average starts there too
            torch.testing.assert_close(model(image).z, expected.z, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    plain_recipe = dataclasses.replace(recipe, init_from="")
    plain = TokenizerTrainer(new_accelerator(recipe.run), plain_recipe)
    for name, value in plain.discriminator.state_dict().items():  # from scratch in both
        assert torch.equal(value, trainer.discriminator.state_dict()[name]), name
    # A run that goes on does not need the image model any more.
    train_tokenizer(recipe, progress=False)
    (tmp_path / "image/model.safetensors").unlink()
    done = train_tokenizer(recipe, progress=False)
    assert done.history == []


def test_a_magvit_run_is_inflated_into_the_middle(tmp_path):
    layout = {"filters": 8, "norm_groups": 4, "channel_multipliers": (1, 2), "num_res_blocks": 1,
              "embedding_dim": 4, "codebook_size": 16}  # fmt: skip
    flat = MagvitTokenizer(
        MagvitConfig(**layout, frame_by_frame=True, temporal_downsample=(False,))
    )
    flat.save_pretrained(tmp_path / "image")
    recipe = tokenizer_recipe(
        tmp_path / "run",
        model=MagvitConfig(**layout, temporal_downsample=(True,)),
        data=dataclasses.replace(SCENES, frames=4),
        init_from=str(tmp_path / "image"),
    )
    trainer = TokenizerTrainer(new_accelerator(recipe.run), recipe)
    ours, theirs = trainer.tokenizer.encoder.conv_in.weight, flat.encoder.conv_in.weight
    assert torch.equal(ours[:, :, 1], theirs[:, :, 0])
    assert torch.equal(trainer.tokenizer.quantizer.codebook, flat.quantizer.codebook)


def test_a_start_that_fits_nothing_or_in_part(tmp_path, caplog):
    other = dataclasses.replace(FLAT, num_bits=4)
    MagvitV2Tokenizer(other).save_pretrained(tmp_path / "bits")
    recipe = tokenizer_recipe(tmp_path / "a", init_from=str(tmp_path / "bits"))
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        TokenizerTrainer(new_accelerator(recipe.run), recipe)
    assert "encoder.conv_out.weight" in caplog.text
    assert load_file(tmp_path / "bits/model.safetensors")["encoder.conv_out.weight"].shape[0] == 4
    recipe = dataclasses.replace(recipe, init_from=str(tmp_path / "nowhere"))
    with pytest.raises(FileFormatError, match="nowhere"):
        TokenizerTrainer(new_accelerator(recipe.run), recipe)
