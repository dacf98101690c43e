"""MaskViT's training rule: given frames stay intact, a random share of all other tokens is masked.

Source: MaskViT (arXiv 2206.11894), section 3.3: r ~ U[0.5, 1) for every video, cross-entropy on
masked positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FutureLoss:
    """loss: nats per masked token, with gradient. accuracy: share of masked tokens whose most likely
    value is right. Both are means over the videos of their own means, so that a video weighs the
    same however much of it is masked."""

    loss: Tensor
    accuracy: Tensor


def given_frames(frames: int, first: int, *, goal: bool = False) -> Tensor:
    """bool [T], True where the frame is given: the `first` leading ones, with a goal the last too.

    Raises:
        ValueError: nothing is given, or nothing is left to predict.
    """
    if first < 1 or first + int(goal) >= frames:
        raise ValueError(
            f"first: expected at least 1 given frame and fewer than {frames} with the goal, "
            f"got {first}{' and a goal' if goal else ''}"
        )
    known = torch.zeros(frames, dtype=torch.bool)
    known[:first] = True
    known[-1] |= goal
    return known


def mask_future(
    ids: Tensor,
    known: Tensor,
    *,
    ratios: tuple[float, float] = (0.5, 1.0),
    u: Tensor | None = None,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which tokens to mask: bool [B, T, h, w], True = MASK.

    A video's ratio is r = low + (high - low) * u, and max(1, round(r * N)) of the N tokens of its
    frames that are not known are masked: those of the lowest scores (ties by position). Halves
    round to the even number. Notes on the paper disagree about how the product is rounded.

    Args:
        ids: int64 [B, T, h, w]; its shape and device count alone.
        known: bool [T], True where the frame is given and stays intact (see `given_frames`).
        ratios: low and high of r; the same number twice is the ablation of one fixed ratio.
        u: uniform draws [B] in [0, 1). scores: uniform [B, T, h, w], those of known frames are
            ignored. What is not given is drawn from `generator`.

    Raises:
        ValueError: a wrong shape, a ratio outside [0, 1], or frames that are all known.
    """
    low, high = ratios
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"ratios: expected 0 <= low <= high <= 1, got {ratios}")
    if ids.dim() != 4:
        raise ValueError(f"ids: expected [B, T, h, w], got {tuple(ids.shape)}")
    batch, frames = ids.shape[:2]
    if known.dtype != torch.bool or tuple(known.shape) != (frames,):
        raise ValueError(
            f"known: expected bool ({frames},), got {known.dtype} {tuple(known.shape)}"
        )
    if bool(known.all()):
        raise ValueError(f"known: expected frames to predict, got {frames} known ones")
    if u is None:
        u = torch.rand(batch, device=ids.device, generator=generator)
    if u.shape != (batch,):
        raise ValueError(f"u: expected ({batch},), got {tuple(u.shape)}")
    if scores is None:
        scores = torch.rand(ids.shape, device=ids.device, generator=generator)
    if scores.shape != ids.shape:
        raise ValueError(f"scores: expected {tuple(ids.shape)}, got {tuple(scores.shape)}")
    per_frame = ids[0, 0].numel() if batch else 0
    future = int((~known).sum()) * per_frame
    count = ((low + (high - low) * u.double()) * future).round().clamp(min=1)
    here = known.to(ids.device).view(1, -1, 1, 1)
    ranks = scores.masked_fill(here, torch.inf).flatten(1)
    ranks = ranks.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (ranks < count.unsqueeze(1)).view(ids.shape) & ~here


def future_loss(logits: Tensor, ids: Tensor, unknown: Tensor) -> FutureLoss:
    """Cross-entropy of logits [B, T, h, w, V] against ids [B, T, h, w] where `unknown` is True.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if logits.shape[:-1] != ids.shape or unknown.shape != ids.shape:
        raise ValueError(
            f"logits: expected {(*ids.shape, 'V')} for ids {tuple(ids.shape)} and unknown "
            f"{tuple(unknown.shape)}, got {tuple(logits.shape)}"
        )
    weights = unknown / unknown.flatten(1).sum(1).clamp(min=1).view(-1, 1, 1, 1)
    nats = F.cross_entropy(logits.float().flatten(0, 3), ids.flatten(), reduction="none")
    right = (logits.detach().argmax(-1) == ids) * weights
    batch = max(len(ids), 1)
    return FutureLoss((nats.view(ids.shape) * weights).sum() / batch, right.sum() / batch)
