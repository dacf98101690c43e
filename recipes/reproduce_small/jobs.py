"""Run jobs: train with the library's own loops, measure, keep one JSON a job.

A job whose JSON is there is done. One that was killed while it trained goes on from the library's
newest checkpoint; everything else of a job is quick and starts again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipes.reproduce_small import costs, measure
from recipes.reproduce_small.clips import Clips
from recipes.reproduce_small.features import RandomVideoFeatures
from recipes.reproduce_small.plan import Job, merged
from torch import Tensor, nn

from magvit_fast.data.atomic import atomic_write_text
from magvit_fast.models import AutoregressiveTransformer, MaskedTransformer, MaskViTTransformer
from magvit_fast.models.inflation import inflate
from magvit_fast.models.tokenizers import load_tokenizer, new_tokenizer
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.nn.vector_quantize import VectorQuantizer
from magvit_fast.training.checkpoints import latest_checkpoint
from magvit_fast.training.config import (
    TokenizerTraining,
    TransformerTraining,
    load_recipe,
)
from magvit_fast.training.maskvit_config import MaskViTTraining
from magvit_fast.training.maskvit_loop import train_maskvit
from magvit_fast.training.run import TrainingResult, new_accelerator
from magvit_fast.training.tokenization import open_or_write_tokens
from magvit_fast.training.tokenizer_loop import train_tokenizer
from magvit_fast.training.transformer_loop import tasks_of, train_transformer

_CALIBRATION_CLIPS = 128
_CODEBOOK_CLIPS = 64
_LATENT_LAYERS = ("encoder.conv_out.", "decoder.conv_in.", "quantizer.")


class Runner:
    """Runs jobs of one plan in one folder.

    work: holds results/NAME.json and models/NAME/ of every job, and the tokens that jobs share.
    held_out: number of clips to measure on.
    """

    def __init__(self, work: Path, clips: Clips, held_out: int) -> None:
        self.work, self.clips, self.held_out_count = work, clips, held_out

    # ---- results ----------------------------------------------------------------------------------
    def result_path(self, name: str) -> Path:
        return self.work / "results" / f"{name}.json"

    def result(self, name: str) -> dict[str, Any] | None:
        """What a job has found; None if it has not run."""
        path = self.result_path(name)
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, from its file or by doing it."""
        done = self.result(job.name)
        if done is not None:
            return done
        wall, cpu = time.perf_counter(), time.process_time()
        work: Callable[[Job], dict[str, Any]] = getattr(self, f"_{job.kind}")
        result = {"job": job.name, "model": job.model, "seed": job.seed, **work(job)}
        result["seconds"] = round(time.perf_counter() - wall, 1)
        result["cpu_seconds"] = round(time.process_time() - cpu, 1)
        path = self.result_path(job.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(result, indent=1) + "\n")
        return result

    # ---- stage one --------------------------------------------------------------------------------
    def _tokenizer(self, job: Job) -> dict[str, Any]:
        folder = self.work / "models" / job.name
        start = folder / "start"
        data = {**self.clips.data(), "labels": False}
        table = merged(job.recipe, {"data": data, "init_from": str(start)})
        recipe = self._recipe(job, table, TokenizerTraining)
        if not start.exists():
            self._prepare(job, recipe, start)
        output, seconds = self._trained(job, lambda: train_tokenizer(recipe, progress=False))
        tokenizer = load_tokenizer(output).eval()
        clips, features = self._measured(recipe.data.frames, recipe.data.size)
        return {
            **_size_of(tokenizer, recipe.run.steps, seconds),
            "scores": {"reconstruction": measure.tokenizer_scores(tokenizer, clips, features)},
        }

    def _prepare(self, job: Job, recipe: TokenizerTraining, folder: Path) -> None:
        """What training starts from: the weights of another tokenizer, or of a calm beginning.

        Either is far quicker than a plain start; with little time it is the difference between blurred
        objects and a mean color.
        """
        torch.manual_seed(job.seed)
        tokenizer = new_tokenizer(recipe.model)
        if job.start is None:
            begin_calmly(tokenizer)
        else:
            source = load_tokenizer(self._output(job.start, "tokenizer"))
            given = dict(source.named_parameters())
            if _vocabulary(source) != _vocabulary(tokenizer):  # the latent's layers do not fit
                given = {n: p for n, p in given.items() if not n.startswith(_LATENT_LAYERS)}
            inflate(tokenizer, given, "last" if tokenizer.config.causal else "central")
        if isinstance(tokenizer.quantizer, VectorQuantizer):
            video = self.clips.reference(_CODEBOOK_CLIPS, recipe.data.frames, recipe.data.size)
            codebook_from_clips(tokenizer, video)
        tokenizer.save_pretrained(folder)

    # ---- stage two --------------------------------------------------------------------------------
    def _transformer(self, job: Job) -> dict[str, Any]:
        model = {"num_classes": len(self.clips.class_names)}
        recipe = self._recipe(job, self._stage_two(job, {"model": model}), TransformerTraining)
        return self._stage_two_scores(
            job, recipe, lambda: train_transformer(recipe, progress=False)
        )

    def _maskvit(self, job: Job) -> dict[str, Any]:
        recipe = self._recipe(job, self._stage_two(job, {}), MaskViTTraining)
        return self._stage_two_scores(job, recipe, lambda: train_maskvit(recipe, progress=False))

    def _stage_two(self, job: Job, more: dict[str, Any]) -> dict[str, Any]:
        assert job.tokenizer is not None, f"models.{job.model}: names no tokenizer"
        name = f"{job.tokenizer}-{job.recipe['tokens']['path']}"
        paths = {
            "data": self.clips.data(),
            "tokenizer": str(self._output(job.tokenizer, "tokenizer")),
            "tokens": {"path": str(self.work / "tokens" / name)},
        }
        return merged(merged(job.recipe, paths), more)

    def _stage_two_scores(
        self, job: Job, recipe: Any, train: Callable[[], TrainingResult]
    ) -> dict[str, Any]:
        tokenizer = load_tokenizer(recipe.tokenizer).eval()
        _write_tokens(recipe, tokenizer)  # first, so that no variant's time has it
        output, seconds = self._trained(job, train)
        transformer = _load_transformer(recipe, output)
        clips, features = self._measured(recipe.data.frames, recipe.data.size)
        scores = measure.generation_scores(
            tokenizer,
            transformer,
            clips,
            features,
            tasks=job.evaluate["tasks"],
            decoding=job.evaluate.get("decoding", {}),
            given_frames=job.evaluate.get("given_frames", 0),
        )
        return {**_size_of(transformer, recipe.run.steps, seconds), "scores": scores}

    # ---- costs ------------------------------------------------------------------------------------
    def _decoding_cost(self, job: Job) -> dict[str, Any]:
        return {"scores": costs.decoding_costs(**job.evaluate)}

    def _attention_cost(self, job: Job) -> dict[str, Any]:
        return {"scores": costs.attention_costs(**job.evaluate)}

    # ---- small things -----------------------------------------------------------------------------
    def _trained(self, job: Job, train: Callable[[], TrainingResult]) -> tuple[Path, float | None]:
        """The trained model's folder and the CPU seconds (None where only the rest was trained)."""
        checkpoints = self._output(job.name, "checkpoints")
        whole = latest_checkpoint(checkpoints) is None
        began = time.process_time()
        output = train().output
        return output, time.process_time() - began if whole else None

    def _output(self, job: str, what: str) -> Path:
        return self.work / "models" / job / what

    def _recipe(self, job: Job, table: dict[str, Any], kind: type[Any]) -> Any:
        """The job's recipe, written to a file that `magvit-fast train` would take too."""
        folder = self.work / "models" / job.name
        folder.mkdir(parents=True, exist_ok=True)
        table = merged(table, {"run": {"output": str(folder)}})
        atomic_write_text(folder / "recipe.toml", to_toml(table))
        return load_recipe(folder / "recipe.toml", kind)

    def _measured(self, frames: int, size: int) -> tuple[Any, RandomVideoFeatures]:
        """The held-out clips, and features scaled to other real ones."""
        features = RandomVideoFeatures()
        if frames > 1:
            features.calibrate(self.clips.reference(_CALIBRATION_CLIPS, frames, size))
        return self.clips.held_out(self.held_out_count, frames, size), features


def _vocabulary(tokenizer: VideoTokenizer) -> tuple[str, int]:
    config = tokenizer.config
    return config.quantizer, config.num_bits


@torch.no_grad()
def begin_calmly(tokenizer: VideoTokenizer) -> None:
    """Residual branches that start as nothing, and a first picture of even gray."""
    for name, parameter in tokenizer.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.zeros_(parameter)
    last = tokenizer.decoder.conv_out
    last.weight.mul_(0.1)
    last.bias.fill_(0.4)


@torch.no_grad()
def codebook_from_clips(tokenizer: VideoTokenizer, video: Tensor) -> None:
    """Codes drawn from what the encoder makes of real clips, so that all are near some of them."""
    z = torch.cat([tokenizer.encoder(v) for v in video.split(16)])
    rows = z.movedim(1, -1).flatten(0, -2)
    codebook = tokenizer.quantizer.codebook
    assert isinstance(codebook, Tensor)
    chosen = torch.randint(len(rows), (len(codebook),))
    codebook.copy_(rows[chosen] + 0.01 * rows.std() * torch.randn_like(codebook))


def _write_tokens(recipe: Any, tokenizer: VideoTokenizer) -> None:
    accelerator = new_accelerator(recipe.run)
    if isinstance(recipe, MaskViTTraining):
        open_or_write_tokens(accelerator, recipe, tokenizer, progress=False)
    else:
        tasks, mode = tasks_of(recipe.task), recipe.task.condition_mode
        open_or_write_tokens(accelerator, recipe, tokenizer, tasks, mode=mode, progress=False)


def _load_transformer(recipe: Any, folder: Path) -> Any:
    if isinstance(recipe, MaskViTTraining):
        return MaskViTTransformer.from_pretrained(folder).eval()
    kind = {"masked": MaskedTransformer, "autoregressive": AutoregressiveTransformer}
    return kind[recipe.objective].from_pretrained(folder).eval()


def _size_of(model: nn.Module, steps: int, seconds: float | None) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "training_cpu_seconds": None if seconds is None else round(seconds, 1),
    }


def to_toml(table: dict[str, Any], prefix: str = "") -> str:
    """Tables of strings, numbers, truth values and lists of them as TOML (JSON writes them alike)."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    text = "\n".join(lines) + "\n" if lines else ""
    for key, value in table.items():
        if isinstance(value, dict):
            text += f"\n[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}"
    return text
