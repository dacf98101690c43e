"""Both stages of MAGVIT: a non-causal tokenizer with a codebook, and the transformer on its tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.training.tiny import SCENES, tokenizer_recipe, transformer_recipe

import magvit_fast as mf
from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import TokenClips, TokenHeader
from magvit_fast.errors import FileFormatError
from magvit_fast.models import (
    Discriminator3D,
    DiscriminatorConfig,
    MagvitConfig,
    MagvitTokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
    load_tokenizer,
)
from magvit_fast.tasks import GIVEN, ClipGeometry, get_task
from magvit_fast.training.config import TaskConfig
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.sources import open_clips
from magvit_fast.training.tokenizer_loop import TokenizerTrainer, train_tokenizer
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


def test_both_stages_and_generation(tmp_path: Path) -> None:
    stage_one = tokenizer_recipe(
        tmp_path / "one", data=CLIPS, model=MODEL, steps=3,
        discriminator=DiscriminatorConfig(filters=4, channel_multipliers=(2, 2), pooling="average"),
    )  # fmt: skip
    result = train_tokenizer(stage_one, progress=False)
    tokenizer = load_tokenizer(result.output)
    assert isinstance(tokenizer, MagvitTokenizer)
    torch.manual_seed(stage_one.run.seed)
    assert not torch.equal(tokenizer.quantizer.codebook, MagvitTokenizer(MODEL).quantizer.codebook)

    shape = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(2, 8, 8), num_subtokens=1,
        subtoken_size=16,
    )  # fmt: skip
    stage_two = transformer_recipe(
        tmp_path / "two", result.output, data=CLIPS, model=shape, steps=2,
        task=TaskConfig(given_frames=1),
    )  # fmt: skip
    trained = train_transformer(stage_two, progress=False)
    # every token sees the whole clip, so that condition tokens are tokens of their own
    task = dataclasses.replace(get_task("frame_prediction"), first=1)
    video = open_clips(CLIPS, 0)[Draw(0, 5)]["video"][None]
    geometry = ClipGeometry(4, 16, 16, (2, 8, 8), causal=False)
    item = TokenClips(tmp_path / "two" / "tokens")[Draw(0, 5)]
    assert torch.equal(item["ids"], tokenizer.encode(video)[0])
    padded = task.condition_video(video, geometry)
    assert torch.equal(item["condition_ids.first1"], tokenizer.encode(padded)[0])

    transformer = MaskedTransformer.from_pretrained(trained.output)
    out = mf.generate(tokenizer, transformer, task="frame_prediction", video=video, steps=2)
    assert out.shape == (1, 3, 4, 16, 16)


def test_both_networks_are_inflated_from_a_2d_run(tmp_path: Path) -> None:
    flat = dataclasses.replace(MODEL, frame_by_frame=True, temporal_downsample=(False,))
    judge = DiscriminatorConfig(filters=4, channel_multipliers=(2, 2), pooling="average")
    images = tokenizer_recipe(
        tmp_path / "2d", data=dataclasses.replace(CLIPS, frames=1), model=flat, steps=2,
        discriminator=dataclasses.replace(judge, clip=(1, 16, 16), frame_by_frame=True),
    )  # fmt: skip
    source = train_tokenizer(images, progress=False).output
    clips = tokenizer_recipe(
        tmp_path / "3d", data=CLIPS, model=MODEL, discriminator=judge, steps=1,
        init_from=str(source), init_discriminator_from=str(tmp_path / "2d/discriminator"),
    )  # fmt: skip
    trainer = TokenizerTrainer(new_accelerator(clips.run), clips)
    two = Discriminator3D.from_pretrained(tmp_path / "2d/discriminator")
    assert trainer.discriminator is not None
    three = trainer.discriminator.cpu()
    assert torch.equal(three.conv_in.weight[:, :, 1], two.conv_in.weight[:, :, 0])
    assert not three.conv_in.weight[:, :, ::2].any()
    assert torch.equal(three.dense.weight, two.dense.weight)
    tokenizer = load_tokenizer(source)
    for model in (trainer.tokenizer.cpu(), trainer.ema.model.cpu()):
        kernel = model.encoder.conv_in.weight
        assert torch.equal(kernel[:, :, 1], tokenizer.encoder.conv_in.weight[:, :, 0])
    # a still clip is judged and tokenized as its image (in float64, where no two codes tie)
    image = torch.rand(2, 3, 1, 16, 16, dtype=torch.float64)
    still = image.expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(three.double()(still), two.double()(image))
        ids = trainer.tokenizer.eval().double().encode(still)
        assert torch.equal(ids, tokenizer.double().encode(image).expand_as(ids))
    wrong = dataclasses.replace(clips, init_discriminator_from=str(source))
    with pytest.raises(
        FileFormatError, match="holds a MagvitTokenizer, expected a Discriminator3D"
    ):
        TokenizerTrainer(new_accelerator(wrong.run), wrong)


@pytest.mark.parametrize("mode", ["latent", "fixed"])
def test_ablation_modes_train(tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    MagvitTokenizer(MODEL).save_pretrained(tmp_path / "tokenizer")
    shape = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(2, 8, 8), num_subtokens=1,
        subtoken_size=16,
    )  # fmt: skip
    recipe = transformer_recipe(
        tmp_path, tmp_path / "tokenizer", data=CLIPS, model=shape, steps=1,
        task=TaskConfig(given_frames=1, condition_mode=mode),  # type: ignore[arg-type]
    )  # fmt: skip
    tokens = TokenHeader("", 4, (2, 8, 8), (4, 16, 16))
    trainer = TransformerTrainer(
        new_accelerator(recipe.run), recipe, tasks_of(recipe.task), tokens, causal=False
    )
    ids, other = torch.randint(0, 16, (2, 2, 8, 8)), torch.randint(0, 16, (2, 2, 8, 8))
    batch, _ = trainer._corrupt({"ids": ids, "condition_ids.first1": other}, ids.flatten(1), 0, 0)
    given = batch.part == GIVEN
    assert given.sum(1).tolist() == [64, 64]
    shown = (ids if mode == "latent" else other).flatten(1)
    assert torch.equal(batch.tokens[given], shown[given])

    # end to end: trained on shards (latent masking needs no condition tokens), then decoded
    result = train_transformer(recipe, progress=False)
    item = TokenClips(tmp_path / "tokens")[Draw(0, 5)]
    assert ("condition_ids.first1" in item) == (mode == "fixed")
    assert result.history[0]["loss_refine"] == 0
    assert result.history[0]["loss_mask"] > 0
    video = open_clips(CLIPS, 0)[Draw(0, 5)]["video"][None]
    tokenizer = MagvitTokenizer.from_pretrained(tmp_path / "tokenizer")
    transformer = MaskedTransformer.from_pretrained(result.output)
    shown_tokens: list[torch.Tensor] = []
    transformer.register_forward_pre_hook(lambda _m, args: shown_tokens.append(args[0]))
    mf.generate(
        tokenizer, transformer, task="frame_prediction", video=video, steps=3,
        condition_mode=mode,  # type: ignore[arg-type]
    )  # fmt: skip
    kept = item["ids" if mode == "latent" else "condition_ids.first1"].flatten()[:64]
    assert all(torch.equal(tokens[0, :64], kept) for tokens in shown_tokens)
    assert len(shown_tokens) == 3


def test_files_that_hold_no_tokenizer_are_named(tmp_path: Path) -> None:
    shape = MaskedTransformerConfig(hidden_size=8, num_layers=1, num_heads=1, mlp_size=8)
    MaskedTransformer(shape).save_pretrained(tmp_path / "model")
    with pytest.raises(FileFormatError, match="holds a MaskedTransformer, expected a MagvitTok"):
        load_tokenizer(tmp_path / "model")
    with pytest.raises(FileFormatError, match="no such directory"):
        load_tokenizer(tmp_path / "nothing")
