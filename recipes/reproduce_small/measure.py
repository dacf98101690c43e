"""What is measured of a trained model on held-out clips."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from recipes.reproduce_small.clips import HeldOut
from recipes.reproduce_small.features import RandomVideoFeatures, distance
from torch import Tensor

import magvit_fast as mf
from magvit_fast.decoding.generate import clip_geometry
from magvit_fast.metrics import codebook_counts, codebook_perplexity, frame_psnr, psnr, ssim
from magvit_fast.models import AutoregressiveTransformer, MaskViTTransformer
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.tasks import ClipGeometry, FrameTask, Task, get_task

_BATCH = 32


@torch.no_grad()
def tokenizer_scores(
    tokenizer: VideoTokenizer, clips: HeldOut, features: RandomVideoFeatures
) -> dict[str, float]:
    """Reconstruction of the held-out clips, and how much of the vocabulary they use."""
    ids = [tokenizer.encode(part) for part in clips.video.split(_BATCH)]
    rebuilt = torch.cat([tokenizer.decode(part) for part in ids])
    counts = codebook_counts(torch.cat(ids), 1 << tokenizer.config.num_bits)
    scores = {
        "psnr": psnr(rebuilt, clips.video).mean(),
        "ssim": ssim(rebuilt, clips.video).mean(),
        "psnr_first_frame": frame_psnr(rebuilt, clips.video)[:, 0].mean(),
        "codes_used": (counts > 0).sum(),
        "perplexity": codebook_perplexity(counts),
        "tokens_per_clip": ids[0][0].numel(),
        "bits_per_token": tokenizer.config.num_bits,
    }
    if rebuilt.shape[2] > 1:  # features are of videos
        scores["frechet"] = distance(features, rebuilt, clips.video)
    return {name: float(value) for name, value in scores.items()}


@torch.no_grad()
def generation_scores(
    tokenizer: VideoTokenizer,
    transformer: Any,
    clips: HeldOut,
    features: RandomVideoFeatures,
    *,
    tasks: list[str],
    decoding: dict[str, Any],
    given_frames: int = 0,
) -> dict[str, dict[str, float]]:
    """For each task: one sample for each held-out clip, against the clip itself.

    psnr: over the pixels that were not given. ssim: whole clips. frechet: the distance of
    features.py. *_copy: the same of the condition video, the trivial answer. nats: cross-entropy of the
    true tokens outside the condition region, a token, when nothing but the condition is known (for an
    autoregressive model: when all tokens before it are).
    """
    return {
        name: _task_scores(
            tokenizer,
            transformer,
            clips,
            features,
            task_of(name, given_frames),
            {"seed": 1, **decoding},
        )
        for name in tasks
    }


def task_of(name: str, given_frames: int) -> Task:
    """The task of that name, with another number of leading frames unless that is 0."""
    task = get_task(name)
    if given_frames and isinstance(task, FrameTask) and not task.last:
        task = dataclasses.replace(task, first=given_frames)
    return task


def _task_scores(
    tokenizer: VideoTokenizer,
    transformer: Any,
    clips: HeldOut,
    features: RandomVideoFeatures,
    task: Task,
    decoding: dict[str, Any],
) -> dict[str, float]:
    geometry = clip_geometry(tokenizer, transformer)
    made, nats = [], []
    parts = zip(clips.video.split(_BATCH), clips.classes.split(_BATCH), strict=True)
    for number, (video, classes) in enumerate(parts):
        known = classes if task.class_conditional else None
        options = {**decoding, "seed": decoding["seed"] + 1000 * number}
        made.append(
            mf.generate(
                tokenizer,
                transformer,
                task=task,
                video=video if task.has_condition else None,
                class_id=known,
                **options,
            )
        )
        nats.append(token_nats(tokenizer, transformer, task, geometry, video, known))
    generated = torch.cat(made)
    scores = {
        "frechet": distance(features, generated, clips.video),
        "nats": sum(nats) / len(nats),
    }
    if not task.has_condition:
        return scores
    copied = task.condition_video(clips.video, geometry)
    unknown = ~task.pixel_mask(geometry)
    for name, candidate in (("", generated), ("_copy", copied)):
        scores[f"psnr{name}"] = psnr_where(candidate, clips.video, unknown)
        scores[f"ssim{name}"] = float(ssim(candidate, clips.video).mean())
    scores["frechet_copy"] = distance(features, copied, clips.video)
    return scores


def psnr_where(prediction: Tensor, target: Tensor, where: Tensor) -> float:
    """Mean over the clips of the PSNR (dB) over the pixels of `where`, bool [T, H, W]."""
    error = (prediction - target).square().mean(1)[:, where].mean(1)
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


@torch.no_grad()
def token_nats(
    tokenizer: VideoTokenizer,
    transformer: Any,
    task: Task,
    geometry: ClipGeometry,
    video: Tensor,
    classes: Tensor | None = None,
) -> float:
    """See generation_scores."""
    transformer.eval()
    ids = tokenizer.encode(video)
    if isinstance(transformer, MaskViTTransformer):
        known = torch.zeros(geometry.frames, dtype=torch.bool)
        assert isinstance(task, FrameTask)
        known[: task.num_first(geometry)] = True
        unknown = (~known)[None, :, None, None].expand_as(ids)
        logits = transformer(ids, unknown)
        return float(F.cross_entropy(logits[unknown].float(), ids[unknown]))
    config = transformer.config
    true, region = ids.flatten(1), task.token_mask(geometry).flatten()
    condition = true
    if task.has_condition:
        condition = tokenizer.encode(task.condition_video(video, geometry)).flatten(1)
    prompt = transformer.prompt_id(task.name, task.prompt)
    prefix: dict[str, Any] = {"class_id": classes, "prompt_id": prompt}
    if config.condition_tokens:
        prefix["condition"] = condition[:, region]
    if isinstance(transformer, AutoregressiveTransformer):
        logits = transformer(true, **prefix)
    elif config.condition_tokens:
        logits = transformer(true, torch.ones_like(true, dtype=torch.bool), **prefix)
    else:
        mask = (~region).expand_as(true)
        logits = transformer(condition, mask, **prefix)
    bits = config.subtoken_size.bit_length() - 1
    total = torch.zeros(())
    for group in range(config.num_subtokens):
        values = (true >> (group * bits)) & (config.subtoken_size - 1)
        total += F.cross_entropy(
            logits[:, ~region, group].flatten(0, 1).float(), values[:, ~region].flatten()
        )
    return float(total)
