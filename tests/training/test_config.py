"""Recipes: all of the repository's load, and every mistake is named with its file and key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.errors import FileFormatError
from magvit_fast.models.ablations import ablation_steps
from magvit_fast.models.discriminator import Discriminator3D
from magvit_fast.models.magvit import MagvitConfig
from magvit_fast.models.magvit_v2 import MagvitV2Config
from magvit_fast.models.masked_transformer import MaskedTransformer
from magvit_fast.models.tokenizers import new_tokenizer
from magvit_fast.training.config import TokenizerTraining, TransformerTraining, load_recipe
from magvit_fast.training.maskvit_config import load_transformer_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RUN = '[run]\noutput = "out"\nsteps = 10\nbatch_size = 4\n'
DATA = '[data]\nsource = "scenes"\n'


def read(tmp_path, text, kind=TokenizerTraining):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, kind)


def kind_of(path: Path) -> type:
    if "\ntokenizer = " not in path.read_text():
        return TokenizerTraining
    return type(load_transformer_recipe(path))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.name)
def test_recipes_of_the_repository_load(path):
    recipe = load_recipe(path, kind_of(path))
    assert recipe.run.steps > 0


def test_published_values():
    recipe = load_recipe(RECIPES / "magvit-v2-base-tokenizer.toml", TokenizerTraining)
    assert recipe.model == MagvitV2Config()
    assert (recipe.loss.reconstruction, recipe.loss.adversarial, recipe.loss.r1) == (5.0, 0.1, 10.0)
    assert (recipe.loss.lecam, recipe.loss.perceptual) == (0.001, 0.1)
    assert (recipe.model.commitment_weight, recipe.model.entropy_weight) == (0.25, 0.1)
    assert (recipe.optimizer.betas, recipe.optimizer.learning_rate) == ((0.0, 0.99), 1e-4)
    assert (recipe.run.batch_size, recipe.ema_decay) == (256, 0.999)
    recipe = load_recipe(RECIPES / "magvit-v2-l-frame-prediction.toml", TransformerTraining)
    assert (recipe.model.hidden_size, recipe.model.num_layers, recipe.model.num_tokens) == (
        1024,
        24,
        1280,
    )
    assert recipe.optimizer.betas == (0.9, 0.96)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_norm) == (0.045, 1.0)
    assert recipe.task.label_smoothing == 1e-4


@pytest.mark.parametrize(
    ("name", "grid", "classes", "batch", "parameters"),
    [
        ("magvit-v2-l-imagenet-256", (1, 16, 16), 1000, 1024, 306_753_536),
        ("magvit-v2-l-imagenet-512", (1, 16, 16), 1000, 1024, 306_753_536),
        ("magvit-v2-l-ucf101-class-generation", (5, 16, 16), 101, 256, 306_881_536),
    ],
)
def test_class_conditional_recipes_of_magvit_v2(name, grid, classes, batch, parameters):
    recipe = load_recipe(RECIPES / f"{name}.toml", TransformerTraining)
    assert (recipe.model.grid, recipe.model.num_classes) == (grid, classes)
    assert (recipe.run.batch_size, recipe.task.class_drop) == (batch, 0.1)
    assert recipe.data.labels
    assert recipe.data.crop_scale == (0.8, 1.0)
    with torch.device("meta"):
        model = MaskedTransformer(recipe.model)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("step", ablation_steps("5c"), ids=lambda step: step.name)
def test_the_ablation_recipe_takes_every_row_of_its_table(step):
    recipe = load_recipe(RECIPES / "magvit-v2-small-ucf101-tokenizer.toml", TokenizerTraining)
    row = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **step.tokenizer),
        discriminator=dataclasses.replace(recipe.discriminator, **step.discriminator),
    )
    clip = (row.data.frames, row.data.size, row.data.size)
    assert row.model.latent_shape(*clip) == (5, 16, 16)
    with torch.device("meta"):
        ids = new_tokenizer(row.model)(torch.empty(1, 3, *clip)).ids
        judge = Discriminator3D(dataclasses.replace(row.discriminator, clip=clip))
        assert judge(torch.empty(1, 3, *clip)).shape == (1, 1)
    assert ids.shape == (1, 5, 16, 16)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_image_tokenizer_recipes(size):
    """Each with the discriminator that judges its images; the video model starts from the first."""
    path = RECIPES / f"magvit-v2-image-{size}-tokenizer.toml"
    recipe = load_recipe(path, TokenizerTraining)
    assert (recipe.data.frames, recipe.data.size) == (1, size)
    assert recipe.model.frame_by_frame
    assert recipe.model.latent_shape(1, size, size) == (1, 16, 16)
    assert recipe.discriminator.frame_by_frame
    assert recipe.run.steps == pytest.approx(270 * 1_281_167 / recipe.run.batch_size, rel=1e-3)
    video = load_recipe(RECIPES / "magvit-v2-base-tokenizer.toml", TokenizerTraining)
    assert video.init_from == "runs/magvit-v2-image-128-tokenizer/tokenizer"
    assert video.inflation == "last"
    if size == 128:
        assert recipe.model.channel_multipliers == video.model.channel_multipliers


def test_published_values_of_magvit():
    schedules = load_goldens("magvit_v1/11_lr_schedule")
    for name, config in (
        ("magvit-b-ucf101-tokenizer", "vqgan3d_ucf101_B"),
        ("magvit-l-ucf101-tokenizer", "vqgan3d_ucf101_L"),
        ("magvit-b-bair-tokenizer", "vqgan3d_bair_B"),
        ("magvit-b-ucf101-class-generation", "maskgvt_ucf101_B"),
    ):
        path = RECIPES / f"{name}.toml"
        recipe = load_recipe(path, kind_of(path))
        assert recipe.run.steps == schedules[f"{config}/total"], name
        assert recipe.optimizer.warmup_steps == schedules[f"{config}/warmup"], name
        assert recipe.optimizer.learning_rate == schedules[f"{config}/base"], name
    recipe = load_recipe(RECIPES / "magvit-l-ucf101-tokenizer.toml", TokenizerTraining)
    assert recipe.model == MagvitConfig(filters=128)
    clip = (recipe.data.frames, recipe.data.size, recipe.data.size)
    with torch.device("meta"):
        judge = Discriminator3D(dataclasses.replace(recipe.discriminator, clip=clip))
    assert round(sum(p.numel() for p in judge.parameters()) / 1e6, 2) == 61.34
    recipe = load_recipe(RECIPES / "magvit-b-ucf101-class-generation.toml", TransformerTraining)
    assert (recipe.model.num_classes, recipe.model.num_tokens, recipe.model.num_bits) == (
        101,
        1024,
        10,
    )


def test_systems_are_named_and_checked(tmp_path):
    magvit = '[model]\nsystem = "magvit"\nfilters = 8\nnorm_groups = 4\n'
    frames = f"{DATA}frames = 16\n"
    assert read(tmp_path, RUN + frames + magvit).model == MagvitConfig(filters=8, norm_groups=4)
    named = read(tmp_path, RUN + DATA + '[model]\nsystem = "magvit-v2"\n')
    assert named.model == MagvitV2Config()
    for text, message in (
        (
            RUN + DATA + '[model]\nsystem = "vq"\n',
            "'model.system': expected 'magvit-v2' or 'magvit'",
        ),
        (RUN + DATA + magvit, "data.frames': expected a multiple of 4 for this model, got 17"),
        (
            RUN + f"{frames}image_ratio = 0.5\n" + magvit,
            "data.image_ratio': this model takes clips",
        ),
        (RUN + frames + magvit + "num_bits = 3\n", "unknown key 'model.num_bits'"),
        (RUN + frames + '[model]\nsystem = "magvit"\npreset = "magvit-v2-base"\n', "no preset"),
    ):
        with pytest.raises(FileFormatError, match=message):
            read(tmp_path, text)


def test_tables_keep_the_defaults_of_their_stage(tmp_path):
    text = f'tokenizer = "t"\n{RUN}{DATA}[tokens]\npath = "p"\n[optimizer]\nlearning_rate = 1\n'
    recipe = read(tmp_path, text, TransformerTraining)
    assert recipe.optimizer.learning_rate == 1.0
    assert recipe.optimizer.betas == (0.9, 0.96)
    assert recipe.optimizer.weight_decay == 0.045


def test_presets_can_be_changed(tmp_path):
    text = f'{RUN}{DATA}[model]\npreset = "magvit-v2-small"\nnum_bits = 14\n'
    model = read(tmp_path, text).model
    assert (model.filters, model.num_res_blocks, model.num_bits) == (64, 2, 14)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RUN + DATA + "[model]\nfilter = 3\n", r"unknown key 'model\.filter'"),
        (RUN + DATA + "[mode]\n", r"unknown key 'mode'; known are data"),
        (RUN + DATA + "[model]\nfilters = '3'\n", r"'model\.filters': expected int, got '3'"),
        (RUN + DATA + "[model]\nfilters = 3.0\n", r"'model\.filters': expected int"),
        (RUN + DATA + "[model]\nfilters = true\n", r"'model\.filters': expected int"),
        (
            RUN + DATA + "[model]\nchannel_multipliers = 3\n",
            r"'model\.channel_multipliers': expected a list of int",
        ),
        (
            RUN + DATA + "[model]\nchannel_multipliers = [1, 'a']\n",
            r"'model\.channel_multipliers\[1\]': expected int",
        ),
        (RUN + DATA + "[optimizer]\nbetas = [1]\n", r"'optimizer\.betas': expected a list of 2 x"),
        (RUN + DATA + "[model]\npreset = 'huge'\n", r"'model\.preset': .*no preset 'huge'"),
        (RUN + DATA + "[model]\nnum_res_blocks = 0\n", r"key 'model\.num_res_blocks': expected"),
        (RUN + "[data]\nsource = 'disk'\n", r"'data\.source': expected one of 'videos', 'scenes'"),
        (RUN + "[data]\nframes = 5\n", r"key 'data\.path': expected a folder"),
        (RUN + DATA + "frames = 6\n", r"key 'data\.frames': expected 1 \+ 4k"),
        (RUN + DATA + "size = 20\n", r"key 'data\.size': expected a multiple of 8"),
        (DATA + "[run]\noutput = 'o'\nsteps = 1\n", r"'run\.batch_size' is missing"),
        (DATA, "'run' is missing"),
        ("run = 3\n" + DATA, "'run': expected a table, got 3"),
        (RUN + DATA + "[loss]\nr1 = -1\n", r"key 'loss\.r1': expected"),
        ("[run\n", "is no valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(FileFormatError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "recipe.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_named_by_its_key(tmp_path):
    text = f"tokenizer = 't'\n{RUN}{DATA}[tokens]\npath = 'x'\n[task]\nname = 'fly'\n"
    with pytest.raises(FileFormatError, match=r"key 'task\.name': expected one of .*'fly'"):
        read(tmp_path, text, TransformerTraining)


def test_missing_file(tmp_path):
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_recipe(tmp_path / "absent.toml", TokenizerTraining)


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.name
)
def test_launch_configurations_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 2
