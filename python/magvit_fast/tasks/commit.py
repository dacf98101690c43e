"""COMMIT: conditional masked modeling by interior tokens (MAGVIT section 3.2), masking and loss.

A position of the corrupted input holds one of three things: its condition token z~ (selected,
inside the condition region: the model must *refine* it), MASK (selected, outside: *mask*), or its
true token z (not selected: *reconstruct*). The model predicts z at every position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast.nn.embedding import unpack_subtokens

Part = Literal["reconstruct", "refine", "mask"]
PARTS: tuple[Part, ...] = (
    "reconstruct",
    "refine",
    "mask",
)  # the index is the code in CommitBatch.part
GIVEN = -1  # the code of positions that are neither masked nor predicted (ablations only)

# How the condition region is treated; the release's names are in commit_mask.
ConditionMode = Literal["commit", "latent", "fixed"]
CONDITION_MODES: tuple[ConditionMode, ...] = ("commit", "latent", "fixed")


@dataclass(frozen=True)
class CommitBatch:
    """A corrupted batch; every field is [B, N], positions in the order t, h, w."""

    tokens: Tensor  # int64, the network's input (ignored where mask is True)
    mask: Tensor  # bool, True = MASK
    targets: Tensor  # int64, the true tokens z
    part: Tensor  # int64 index into PARTS, or GIVEN


@dataclass(frozen=True)
class CommitLoss:
    """The training loss and its parts: scalars in nats per token, detached but for `loss`."""

    loss: Tensor
    parts: dict[
        str, Tensor
    ]  # mean cross-entropy over the positions of each part, 0 where it is empty
    fractions: dict[str, Tensor]  # share of each part among all positions
    accuracies: dict[str, Tensor]  # share of exactly right tokens in each part, 0 where it is empty
    subtokens: Tensor  # [G], what each sub-token adds to the loss; sub-token 0 has the lowest bits


def mask_ratio(u: Tensor) -> Tensor:
    """Share of selected positions for uniform draws u: cos(pi u / 2), within [1e-6, 1]."""
    return torch.cos(u.float() * (math.pi / 2)).clamp(1e-6, 1.0)


def commit_mask(
    targets: Tensor,
    condition: Tensor | None = None,
    condition_mask: Tensor | None = None,
    *,
    mode: ConditionMode = "commit",
    u: Tensor | None = None,
    ratio: Tensor | None = None,
    scores: Tensor | None = None,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> CommitBatch:
    """Corrupt a batch of token grids.

    targets: int64 [B, N], tokens z of the real video.
    condition: int64 [B, N], tokens z~ of the condition video through the same tokenizer; with
    condition_mask: bool [N] or [B, N], True inside the condition region. Both None for a task
        without condition.

    n = max(1, floor(N * cos(pi u / 2))) positions are selected (the released code; the paper prints
    ceil): those of the n lowest scores (ties by position, so always exactly n; the released code
    selects every position of a tied threshold).
    u: uniform draws, one element (one ratio for the batch, as the released code does) or B elements
    (one a sample, as the paper's notation reads). ratio: the share itself in place of the cosine of
    a draw. scores: uniform [B, N]. What is not given is drawn from `generator`; `per_sample`
    chooses the number of drawn ratios.

    mode: "commit" is the method ("cond->input" in the release). Two ablations of the paper never
    select inside the condition region, count n over the other positions and ask for no prediction
    there (part GIVEN): "latent" shows the true tokens ("input->input", the paper's latent masking),
    "fixed" the condition tokens, which are then the targets too ("cond->cond").
    """
    batch, n = _check_targets(targets)
    device = targets.device
    if mode not in CONDITION_MODES:
        raise ValueError(f"mode: expected one of {CONDITION_MODES}, got {mode!r}")
    if (condition is None) != (condition_mask is None):
        raise ValueError("condition and condition_mask: expected both or neither")
    if u is not None and ratio is not None:
        raise ValueError("u and ratio: expected at most one of them")
    if ratio is None:
        if u is None:
            u = torch.rand(batch if per_sample else 1, device=device, generator=generator)
        ratio = mask_ratio(u)
    if ratio.numel() not in (1, batch):
        name = "ratio" if u is None else "u"
        raise ValueError(f"{name}: expected 1 or {batch} draws, got shape {tuple(ratio.shape)}")
    if scores is None:
        scores = torch.rand(batch, n, device=device, generator=generator)
    if scores.shape != targets.shape:
        raise ValueError(f"scores: expected {tuple(targets.shape)}, got {tuple(scores.shape)}")

    if condition is None or condition_mask is None:
        condition, inside = targets, torch.zeros_like(targets, dtype=torch.bool)
    else:
        inside = _check_condition(targets, condition, condition_mask)
    given = inside if mode != "commit" else torch.zeros_like(inside)
    if mode == "fixed":
        targets = torch.where(inside, condition, targets)
    selectable = n - given.sum(1, keepdim=True)  # [B, 1]
    share = ratio.float().clamp(1e-6, 1.0).reshape(-1, 1)
    count = (share * selectable).floor().clamp(min=1).minimum(selectable)
    rank = scores.masked_fill(given, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    selected = rank < count
    mask = selected & ~inside
    part = torch.where(mask, 2, torch.where(selected, 1, 0)).masked_fill(given, GIVEN)
    tokens = torch.where(selected & inside, condition, targets)
    return CommitBatch(tokens=tokens, mask=mask, targets=targets, part=part)


def commit_loss(
    logits: Tensor,
    batch: CommitBatch,
    *,
    label_smoothing: float = 1e-4,
    loss_on: tuple[Part, ...] = PARTS,
) -> CommitLoss:
    """Cross-entropy of logits [B, N, G, V] against the true tokens, summed over the G sub-tokens.

    Label smoothing spreads e over the V values (on 1 - e + e/V, off e/V). Positions of the parts in
    `loss_on` weigh 1, others 0: a weighted mean per sample, then the mean over the batch. All parts
    is the published recipe; fewer is for ablations.
    """
    b, n, g, v = logits.shape
    if batch.targets.shape != (b, n):
        raise ValueError(
            f"logits: expected [{batch.targets.shape[0]}, {batch.targets.shape[1]}, G, V], "
            f"got {tuple(logits.shape)}"
        )
    unknown = set(loss_on) - set(PARTS)
    if unknown or not loss_on:
        raise ValueError(f"loss_on: expected some of {PARTS}, got {loss_on!r}")
    values = unpack_subtokens(batch.targets, g, v)  # [B, N, G]
    nats = F.cross_entropy(
        logits.float().flatten(0, 2),
        values.flatten(),
        label_smoothing=label_smoothing,
        reduction="none",
    )
    each = nats.view(b, n, g)
    nats = each.sum(-1)  # [B, N]
    weights = torch.zeros_like(nats)
    for name in set(loss_on):
        weights += batch.part == PARTS.index(name)
    total = weights.sum(-1) + 1e-8
    loss = ((weights * nats).sum(-1) / total).mean()
    by_subtoken = (weights.unsqueeze(-1) * each.detach()).sum(1) / total.unsqueeze(-1)  # [B, G]

    right = (logits.detach().argmax(-1) == values).all(-1)
    parts: dict[str, Tensor] = {}
    fractions: dict[str, Tensor] = {}
    accuracies: dict[str, Tensor] = {}
    for code, name in enumerate(PARTS):
        here = batch.part == code
        size = here.sum().clamp(min=1)
        parts[name] = (nats.detach() * here).sum() / size
        fractions[name] = here.float().mean()
        accuracies[name] = (right & here).sum() / size
    return CommitLoss(loss, parts, fractions, accuracies, by_subtoken.mean(0))


def _check_targets(targets: Tensor) -> tuple[int, int]:
    if targets.dim() != 2 or targets.shape[1] < 1:
        raise ValueError(f"targets: expected [B, N] with N >= 1, got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    return targets.shape[0], targets.shape[1]


def _check_condition(targets: Tensor, condition: Tensor, condition_mask: Tensor) -> Tensor:
    if condition.shape != targets.shape or condition.dtype != torch.int64:
        raise ValueError(
            f"condition: expected int64 {tuple(targets.shape)}, "
            f"got {condition.dtype} {tuple(condition.shape)}"
        )
    if condition_mask.dtype != torch.bool or condition_mask.shape not in (
        targets.shape,
        targets.shape[1:],
    ):
        raise ValueError(
            f"condition_mask: expected bool {tuple(targets.shape[1:])} or {tuple(targets.shape)}, "
            f"got {condition_mask.dtype} {tuple(condition_mask.shape)}"
        )
    return condition_mask.expand(targets.shape)
