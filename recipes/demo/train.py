"""Train the two models of `magvit-fast demo` from scratch on rendered scenes.

    python recipes/demo/train.py recipes/demo/demo.toml --output runs/demo

writes tokenizer/, transformer/ and demo.json: what python/magvit_fast/demo/ holds. Interrupted, it
goes on after the last finished part (tokenizer, tokens, transformer, decoder). What is special here, beside
`magvit-fast train`, is what makes 80 minutes of one CPU core enough:

- bits are learned softly: tanh(z) is decoded at first, and a growing share of it becomes the sign;
- the tokenizer starts as one for images, on crops, and is inflated to video as in MAGVIT-v2: the
  newest time slice of each kernel takes all the weight;
- clips grow from 5 frames of 32 pixels; then the decoder alone is trained on whole clips;
- the transformer starts from embeddings that know about bits and about the grid;
- at the end the decoder learns from predicted tokens too: where the future is uncertain it blends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import magvit_fast as mf
from magvit_fast.data.synthetic import HELD_OUT_SEEDS, TRAIN_SEEDS, render_clip
from magvit_fast.data.video import read_video, write_video
from magvit_fast.metrics import psnr
from magvit_fast.models import MagvitV2Tokenizer, MaskedTransformer
from magvit_fast.nn.conv import CausalConv3d
from magvit_fast.nn.resample import Upsample
from magvit_fast.tasks import commit_loss, commit_mask
from magvit_fast.training.ema import Ema
from magvit_fast.training.network import weight_decay_groups
from magvit_fast.training.schedules import warmup_cosine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FRAMES, SIZE, GIVEN = 17, 64, 5


@dataclass(frozen=True)
class Stage:
    """Some steps on crops of `frames` frames and `size` x `size` pixels."""

    frames: int
    size: int
    batch_size: int
    steps: int
    decoder_only: bool = False


@dataclass(frozen=True)
class TokenizerRecipe:
    preset: str
    learning_rate: float
    betas: tuple[float, float]
    warmup_steps: int
    clip_norm: float
    ema_decay: float
    reconstruction_weight: float
    soft_steps: int
    stages: tuple[Stage, ...]
    quantizer: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformerRecipe:
    preset: str
    steps: int
    batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    ema_decay: float
    label_smoothing: float
    largest_draw: float


@dataclass(frozen=True)
class PolishRecipe:
    steps: int
    learning_rate: float
    betas: tuple[float, float]
    warmup_steps: int
    clip_norm: float
    ema_decay: float
    reconstruction_weight: float
    prediction_weight: float


@dataclass(frozen=True)
class Recipe:
    precision: str
    threads: int
    seed: int
    tokenizer: TokenizerRecipe
    tokens: dict[str, int]
    transformer: TransformerRecipe
    polish: PolishRecipe
    decoding: dict[str, Any]
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        stages = tuple(Stage(**stage) for stage in table["tokenizer"].pop("stages"))
        table["tokenizer"] = TokenizerRecipe(stages=stages, **table["tokenizer"])
        table["transformer"] = TransformerRecipe(**table["transformer"])
        table["polish"] = PolishRecipe(**table["polish"])
        return cls(**table)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


# ---- stage one: the tokenizer --------------------------------------------------------------------
def train_tokenizer(recipe: Recipe) -> MagvitV2Tokenizer:
    """All stages; the result is the average of the weights."""
    options = recipe.tokenizer
    model = MagvitV2Tokenizer.from_preset(options.preset, **options.quantizer)
    start_small(model)
    ema = Ema(model, options.ema_decay)
    total, step = sum(stage.steps for stage in options.stages), 0
    seeds = iter(TRAIN_SEEDS)
    before: Stage | None = None
    for stage in options.stages:
        if before is not None and before.frames == 1 < stage.frames:
            for network in (model, ema.model):
                inflate(network)
        if stage.decoder_only:  # for good: the tokens are those of the average
            model.encoder.load_state_dict(ema.model.encoder.state_dict())
            model.encoder.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=options.learning_rate, betas=options.betas)
        batches, log = crops(stage, seeds, recipe.seed + step), Log("tokenizer", stage.steps)
        for part in range(stage.steps):
            factor = warmup_cosine(step, warmup=options.warmup_steps, total=total)
            factor *= min(1.0, (part + 1) / options.warmup_steps)  # Adam starts anew in each stage
            set_rate(optimizer, options.learning_rate * factor)
            video = next(batches)
            with recipe.autocast():
                output, quantizer = tokenizer_step(model, video, step, options.soft_steps)
            error = (output.float() - video).square().mean()
            loss = options.reconstruction_weight * error + quantizer
            update(optimizer, loss, trained, options.clip_norm)
            # The average has little to say at first: it follows closely, then ever more slowly.
            ema.decay = min(options.ema_decay, (1 + step) / (10 + step))
            ema.update(model)
            step += 1
            log.add(part, psnr=-10 * error.detach().log10())
        before = stage
    return ema.model


def tokenizer_step(
    model: MagvitV2Tokenizer, video: Tensor, step: int, soft_steps: int
) -> tuple[Tensor, Tensor]:
    """Reconstruction and the quantizer's loss; soft bits before `soft_steps`."""
    if step >= soft_steps:
        output = model(video)
        return output.reconstruction, output.losses["quantizer"]
    z = model.encoder(video.contiguous(memory_format=torch.channels_last_3d))
    soft = torch.tanh(z.float())
    bits = torch.where(z > 0, 1.0, -1.0)
    hard = soft + (bits - soft).detach()
    mixed = torch.where(torch.rand_like(soft) < step / soft_steps, hard, soft)
    commitment = model.quantizer.commitment_weight * (z.float() - bits).square().mean()
    return model.decoder(mixed), commitment


@torch.no_grad()
def start_small(model: MagvitV2Tokenizer) -> None:
    """Residual branches that start as nothing, and a first picture of even gray."""
    for name, parameter in model.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.zeros_(parameter)
    last = model.decoder.conv_out
    last.weight.mul_(0.1)
    assert last.bias is not None
    last.bias.fill_(0.4)


@torch.no_grad()
def inflate(model: MagvitV2Tokenizer) -> None:
    """From images to video: what all time slices did to one frame, the newest now does alone.

    Up-sampling in time makes two frames of one; for images only the second was ever kept, so the
    first gets its weights.
    """
    for module in model.modules():
        if isinstance(module, CausalConv3d) and module.kernel_size[0] > 1:
            newest = module.weight.sum(dim=2)
            module.weight.zero_()
            module.weight[:, :, -1] = newest
        if isinstance(module, Upsample) and module.factor[0] == 2:
            for parameter in module.conv.parameters():
                half = parameter.shape[0] // 2
                parameter[:half] = parameter[half:]


def crops(stage: Stage, seeds: Iterator[int], seed: int) -> Iterator[Tensor]:
    """Endless batches [B, 3, T, S, S] in [0, 1], cut at random from ever new training scenes."""
    rng = np.random.default_rng(seed)
    whole = (stage.frames, stage.size) == (FRAMES, SIZE)
    # Rendering a scene costs little, but more than a crop of it.
    cuts = 1 if whole else stage.batch_size if stage.frames == 1 else 2
    while True:
        clips: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        while len(clips) < stage.batch_size:
            scene = render_clip(next(seeds), FRAMES, SIZE)
            for _ in range(cuts):
                t = rng.integers(0, FRAMES - stage.frames + 1)
                y, x = rng.integers(0, SIZE - stage.size + 1, 2)
                cut = scene[t : t + stage.frames, y : y + stage.size, x : x + stage.size]
                clips.append(cut)
        yield to_video(np.stack(clips[: stage.batch_size]))


# ---- stage two: tokens and the transformer -------------------------------------------------------
@torch.no_grad()
def encode_scenes(recipe: Recipe, tokenizer: MagvitV2Tokenizer) -> Tensor:
    """Tokens [N, 320] of the first training scenes."""
    count, size = recipe.tokens["clips"], recipe.tokens["batch_size"]
    ids, log = [], Log("tokens", count)
    for first in range(0, count, size):
        scenes = [render_clip(s) for s in TRAIN_SEEDS[first : min(first + size, count)]]
        with recipe.autocast():
            ids.append(tokenizer.encode(to_video(np.stack(scenes))).flatten(1))
        log.add(first)
    return torch.cat(ids)


def train_transformer(recipe: Recipe, tokens: Tensor) -> MaskedTransformer:
    """COMMIT training of frame prediction; the result is the average of the weights."""
    options = recipe.transformer
    model = MaskedTransformer.from_preset(options.preset, dropout=0.0)
    start_structured(model, torch.Generator().manual_seed(recipe.seed))
    ema = Ema(model, options.ema_decay)
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model, options.weight_decay),
        lr=options.learning_rate,
        betas=options.betas,
    )
    condition = given_positions(model)
    log = Log("transformer", options.steps)
    for step in range(options.steps):
        factor = warmup_cosine(step, warmup=options.warmup_steps, total=options.steps)
        set_rate(optimizer, options.learning_rate * factor)
        chosen = tokens[torch.randint(len(tokens), (options.batch_size,))]
        # Small draws are high mask ratios: all that could be told from a neighbor in the same frame
        # is gone, and motion is what is left to learn from.
        draws = options.largest_draw * torch.rand(len(chosen)).square()
        batch = commit_mask(chosen, chosen, condition, u=draws)
        with recipe.autocast():
            logits = model(batch.tokens, batch.mask)
        result = commit_loss(logits, batch, label_smoothing=options.label_smoothing)
        update(optimizer, result.loss, list(model.parameters()), options.clip_norm)
        ema.decay = min(options.ema_decay, (1 + step) / (10 + step))
        ema.update(model)
        log.add(step, loss=result.loss, masked=result.parts["mask"])
    return ema.model


def given_positions(transformer: MaskedTransformer) -> Tensor:
    """bool [N]: the first 5 frames alone make the first two slots, as the tokenizer is causal."""
    slots, rows, columns = transformer.config.grid
    return torch.arange(slots * rows * columns) < 2 * rows * columns


@torch.no_grad()
def start_structured(model: MaskedTransformer, generator: torch.Generator) -> None:
    """A start that knows that ids are bits and that positions lie on a grid.

    Rows of a sub-table that share bits start alike (heads are tied to the tables, so the first
    logits are those of independent bits), and positions start as waves along t, h and w. Without
    it the first thousand steps go into finding that out.
    """
    config = model.config
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, 0.05, generator=generator)
    count = config.subtoken_size.bit_length() - 1
    values = torch.arange(config.subtoken_size)
    signs = ((values[:, None] >> torch.arange(count)) & 1) * 2.0 - 1.0
    for table in model.token_embedding.weight:
        shared = signs @ torch.randn(count, config.hidden_size, generator=generator)
        own = torch.randn(table.shape, generator=generator)
        table.copy_(0.04 / count**0.5 * shared + 0.008 * own)
    slots, rows, columns = config.grid
    quarter = config.hidden_size // 4
    widths = (quarter, (config.hidden_size - quarter) // 2, (config.hidden_size - quarter) // 2)
    waves = []
    for axis, (length, width) in enumerate(zip(config.grid, widths, strict=True)):
        frequency = torch.pi * torch.arange(1, width // 2 + 1) / (width // 2)
        angle = (torch.arange(length) + 0.5)[:, None] * frequency
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)
        shape = [1, 1, 1, wave.shape[1]]
        shape[axis] = length
        waves.append(wave.view(shape).expand(slots, rows, columns, -1))
    model.position_embedding[config.prefix_length :] = 0.06 * torch.cat(waves, -1).flatten(0, 2)


# ---- stage three: the decoder meets the transformer ----------------------------------------------
def polish_decoder(
    recipe: Recipe, tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer, tokens: Tensor
) -> MagvitV2Tokenizer:
    """Train the decoder on true and on predicted tokens in turn; ids stay what they are."""
    options = recipe.polish
    tokenizer.train().encoder.requires_grad_(False)
    ema = Ema(tokenizer, options.ema_decay)
    parameters = list(tokenizer.decoder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, betas=options.betas)
    grid, unknown = transformer.config.grid, ~given_positions(transformer)
    size, log = transformer.config.subtoken_size, Log("decoder", options.steps)
    for step in range(options.steps):
        factor = warmup_cosine(step, warmup=options.warmup_steps, total=options.steps)
        set_rate(optimizer, options.learning_rate * factor)
        seed = int(torch.randint(len(tokens), ()))
        ids, video = tokens[seed : seed + 1], to_video(render_clip(TRAIN_SEEDS[seed])[None])
        predicted = step % 2 == 1
        with recipe.autocast():
            if predicted:
                with torch.no_grad():
                    best = transformer(ids, unknown.expand_as(ids)).argmax(-1)
                ids = torch.where(unknown, best[..., 0] + size * best[..., 1], ids)
            codes = tokenizer.quantizer.codes(ids.view(1, *grid))
            output = tokenizer.decoder(codes.contiguous(memory_format=torch.channels_last_3d))
        error = (output.float() - video).square()
        weight = options.prediction_weight if predicted else options.reconstruction_weight
        error = error[:, :, GIVEN:].mean() if predicted else error.mean()
        update(optimizer, weight * error, parameters, options.clip_norm)
        ema.decay = min(options.ema_decay, (20 + step) / (30 + step))
        ema.update(tokenizer)
        log.add(step, **{f"psnr_{'predicted' if predicted else 'true'}": -10 * error.log10()})
    return ema.model


# ---- what it is worth ----------------------------------------------------------------------------
def evaluate(
    recipe: Recipe, tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> dict[str, float]:
    """Mean scores over held-out scenes, each read back from an H.264 file; PSNR in dB."""
    scores: dict[str, list[float]] = {"reconstruction": [], "prediction": [], "copy_last_frame": []}
    for seed in HELD_OUT_SEEDS[: recipe.evaluation["clips"]]:
        video = compressed(render_clip(seed), recipe.evaluation["crf"])
        with torch.no_grad():
            rebuilt = tokenizer.decode(tokenizer.encode(video))
        predicted = mf.generate(
            tokenizer,
            transformer,
            task="frame_prediction",
            video=video[:, :, :GIVEN],
            **recipe.decoding,
        )
        future = video[:, :, GIVEN:]
        copied = video[:, :, GIVEN - 1 : GIVEN].expand_as(future)
        scores["reconstruction"].append(psnr(rebuilt, video).item())
        scores["prediction"].append(psnr(predicted[:, :, GIVEN:], future).item())
        scores["copy_last_frame"].append(psnr(copied, future).item())
    means = {f"psnr_{name}": float(np.mean(values)) for name, values in scores.items()}
    means["gain_over_copying"] = means["psnr_prediction"] - means["psnr_copy_last_frame"]
    return {name: round(value, 2) for name, value in means.items()}


def compressed(frames: np.ndarray[Any, np.dtype[np.uint8]], crf: float) -> Tensor:
    """uint8 [T, H, W, 3] through H.264 and back: [1, 3, T, H, W] in [0, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, torch.from_numpy(frames).permute(3, 0, 1, 2), 8.0, crf=crf)
        return read_video(path, frames=len(frames)).unsqueeze(0)


# ---- small things --------------------------------------------------------------------------------
def to_video(clips: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in [0, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[Tensor], clip_norm: float
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()


class Log:
    """A line with the means of some values, every minute and at the end."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.began = self.last = time.monotonic()
        self.values: dict[str, list[float]] = {}

    def add(self, step: int, **values: Tensor) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value.detach()))
        now = time.monotonic()
        if now - self.last < 60 and step + 1 < self.total:
            return
        means = " ".join(f"{name} {np.mean(v):.3f}" for name, v in self.values.items())
        print(f"{self.name} {step + 1}/{self.total} {now - self.began:.0f} s {means}", flush=True)
        self.last, self.values = now, {}


def run(recipe: Recipe, output: Path) -> dict[str, float]:
    """Everything that is not yet in `output`; returns the scores."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    first = output / "first_tokenizer"
    if not first.exists():
        train_tokenizer(recipe).save_pretrained(first, dtype=torch.float16)
    tokenizer = MagvitV2Tokenizer.from_pretrained(first)
    if not (output / "tokens.npy").exists():
        np.save(output / "tokens.npy", encode_scenes(recipe, tokenizer).numpy())
    tokens = torch.from_numpy(np.load(output / "tokens.npy"))
    if not (output / "transformer").exists():
        transformer = train_transformer(recipe, tokens)
        transformer.save_pretrained(output / "transformer", dtype=torch.float16)
    transformer = MaskedTransformer.from_pretrained(output / "transformer")
    if not (output / "tokenizer").exists():
        polished = polish_decoder(recipe, tokenizer, transformer, tokens)
        polished.save_pretrained(output / "tokenizer", dtype=torch.float16)
    tokenizer = MagvitV2Tokenizer.from_pretrained(output / "tokenizer")
    scores = evaluate(recipe, tokenizer, transformer)
    facts = {
        "decoding": recipe.decoding,
        "held_out": {
            "clips": recipe.evaluation["clips"],
            "crf": recipe.evaluation["crf"],
            **scores,
        },
        "seconds": round(time.monotonic() - began),
    }
    (output / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    scores = run(Recipe.read(args.recipe), args.output)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
