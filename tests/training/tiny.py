"""The smallest recipes that still have every part, for the tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from magvit_fast.data.synthetic import render_clip
from magvit_fast.data.video import write_video
from magvit_fast.models.autoencoder import AutoencoderConfig
from magvit_fast.models.discriminator import DiscriminatorConfig
from magvit_fast.models.frame_tokenizer import FrameTokenizerConfig
from magvit_fast.models.magvit_v2 import MagvitV2Config
from magvit_fast.models.masked_transformer import MaskedTransformerConfig
from magvit_fast.models.maskvit import MaskViTConfig
from magvit_fast.models.tokenizers import new_tokenizer
from magvit_fast.training.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TaskConfig,
    TokenizerTraining,
    TokensConfig,
    TransformerTraining,
)
from magvit_fast.training.maskvit_config import MaskViTTraining

SCENES = DataConfig(source="scenes", scenes=8, frames=5, size=16)
MODEL = MagvitV2Config(
    filters=8,
    channel_multipliers=(1, 2, 2),
    temporal_downsample=(False, True),
    num_res_blocks=1,
    num_bits=6,
)

# MaskViT: clips of 4 x 8 x 8 pixels, 4 x 4 x 4 tokens
FRAME_CLIPS = dataclasses.replace(SCENES, frames=4, size=8)
FRAME_MODEL = FrameTokenizerConfig(
    filters=8, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=4, codebook_size=16,
    embedding_dim=4,
)  # fmt: skip
MASKVIT = MaskViTConfig(
    frames=4, grid=(4, 4), codebook_size=16, hidden_size=16, num_blocks=1, num_heads=2, mlp_size=32,
    window=(2, 2),
)  # fmt: skip


def run(output: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "workers": 0,
        "log_every": 1,
        "checkpoint_every": 2,
        "tensorboard": False,
    }
    return RunConfig(output=str(output), **{**settings, **changes})


def tokenizer_recipe(output: Path, **changes: Any) -> TokenizerTraining:
    """Changes to fields of [run] go there, others to the recipe itself."""
    names = {f.name for f in dataclasses.fields(RunConfig)}
    of_run = {k: changes.pop(k) for k in list(changes) if k in names}
    settings: dict[str, Any] = {
        "data": SCENES,
        "model": MODEL,
        "discriminator": DiscriminatorConfig(filters=4, channel_multipliers=(2, 2, 2)),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
    }
    return TokenizerTraining(run=run(output, **of_run), **{**settings, **changes})


def transformer_recipe(output: Path, tokenizer: Path, **changes: Any) -> TransformerTraining:
    names = {f.name for f in dataclasses.fields(RunConfig)}
    of_run = {k: changes.pop(k) for k in list(changes) if k in names}
    settings: dict[str, Any] = {
        "data": SCENES,
        "tokens": TokensConfig(str(output / "tokens"), shard_size=3, batch_size=2),
        "model": MaskedTransformerConfig(
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            mlp_size=32,
            grid=(3, 4, 4),
            num_subtokens=2,
            subtoken_size=8,
        ),
        "task": TaskConfig(given_frames=3),
        "optimizer": OptimizerConfig(1e-3, (0.9, 0.96), 0.045, warmup_steps=1, clip_norm=1.0),
    }
    return TransformerTraining(
        run=run(output, **of_run), tokenizer=str(tokenizer), **{**settings, **changes}
    )


def maskvit_recipe(output: Path, tokenizer: Path, **changes: Any) -> MaskViTTraining:
    """Changes to fields of [run] go there, others to the recipe itself."""
    names = {f.name for f in dataclasses.fields(RunConfig)}
    of_run = {k: changes.pop(k) for k in list(changes) if k in names}
    settings: dict[str, Any] = {
        "data": FRAME_CLIPS,
        "tokens": TokensConfig(str(output / "tokens"), shard_size=3, batch_size=2),
        "model": MASKVIT,
        "optimizer": OptimizerConfig(1e-2, (0.9, 0.999), warmup_steps=1, clip_norm=1.0),
    }
    return MaskViTTraining(
        run=run(output, **of_run), tokenizer=str(tokenizer), **{**settings, **changes}
    )


def save_tokenizer(folder: Path, model: AutoencoderConfig = MODEL) -> Path:
    """A tokenizer with random weights."""
    torch.manual_seed(0)
    new_tokenizer(model).save_pretrained(folder)
    return folder


def write_scene(path: Path, seed: int, frames: int, size: int = 32) -> None:
    """A rendered scene as an H.264 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.from_numpy(render_clip(seed, frames, size)).permute(3, 0, 1, 2))
