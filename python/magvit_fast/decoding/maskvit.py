"""MaskViT's iterative decoding: given frames stay, all others start as MASK and fill in a few passes.

Source: MaskViT (arXiv 2206.11894), section 3.3 and its table of forward passes; its code is not
public. In every pass all masked tokens are predicted, n = ceil(g(t / T) * N) of the N future ones
stay masked, those of least confidence, and what is kept stays kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from magvit_fast.decoding._inputs import (
    Tokenizer,
    check_devices,
    check_pixels,
    checked_video,
    count_windows,
    evaluation,
)
from magvit_fast.decoding.confidence import Confidence, Noise
from magvit_fast.decoding.masked import MaskedDecoding, Predict, decode_masked
from magvit_fast.decoding.schedules import masked_counts
from magvit_fast.ops._checks import check_tensor
from magvit_fast.tasks.registry import ClipGeometry, FrameTask, Task


class FramePredictorConfig(Protocol):
    """Frames of a clip at most, tokens of a frame (h, w), codes, numbers of an action (0 = none)."""

    @property
    def frames(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def action_dim(self) -> int: ...


class FramePredictor(Protocol):
    """What decoding needs of the network (MaskViTTransformer is one).

    Called with ids int64 [B, T, h, w], unknown bool [B, T, h, w] and actions [B, T, A] or None, it
    returns logits [B, T, h, w, V], V a power of two.
    """

    @property
    def config(self) -> FramePredictorConfig: ...

    def __call__(
        self, ids: Tensor, unknown: Tensor, *, actions: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class MaskViTDecoding(MaskedDecoding):
    """How MaskViT decodes; fields as MaskedDecoding's, with its counts and defaults.

    Published passes: BAIR 24, BAIR with actions 12, KITTI 48, RoboNet 5. Schedules: cosine, square
    and cubic do best, linear less, square_root worst; which passes go with which is not published.

    temperature: whether values are drawn (1) or the likeliest are taken (0) is not published; drawn
        by default, as in the decoders that MaskViT builds on.
    choice_temperature: about 4.5 is best in the paper. 0 = no noise.
    confidence: "probability" is what the paper describes: softmax probability + annealed noise. Its
        code is not public; "log_probability" is what the code of its kind does (MaskGIT, MAGVIT).
    """

    confidence: Confidence = "probability"
    fixed_condition: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fixed_condition:
            raise ValueError(
                "fixed_condition: expected True, MaskViT's given frames stay; got False"
            )
        if self.guidance.scale:
            raise ValueError(
                "guidance: expected 0, MaskViT has no unconditional branch, "
                f"got {self.guidance.scale}"
            )

    @classmethod
    def for_planning(cls, steps: int = 5) -> MaskViTDecoding:
        """Five passes without noise, as VP2 runs MaskViT in its planner (`temperature: None`).

        Values are the likeliest ones here, so that a prediction is a function of its actions.
        """
        return cls(steps=steps, temperature=0.0, choice_temperature=0.0)

    def counts(self, num_tokens: int) -> list[int]:
        """Masked tokens after each pass; num_tokens is the number of future ones."""
        if isinstance(self.schedule, str):
            return masked_counts(self.schedule, num_tokens, self.steps)
        return super().counts(num_tokens)


def frame_geometry(tokenizer: Tokenizer, transformer: FramePredictor) -> ClipGeometry:
    """The longest clip, in pixels and tokens, that this pair of models makes.

    Raises:
        ValueError: the two do not fit: other codebooks, or a tokenizer that joins frames.
    """
    ours, theirs = transformer.config, tokenizer.config
    bits = ours.codebook_size.bit_length() - 1
    if bits != theirs.num_bits:
        raise ValueError(
            f"transformer: its {ours.codebook_size} codes are {bits} bits, but the tokenizer's ids "
            f"have {theirs.num_bits} bits; use the transformer that was trained on this "
            "tokenizer's tokens"
        )
    if theirs.time_stride != 1:
        raise ValueError(
            "tokenizer: expected one that takes every frame by itself (a FrameTokenizer) for a "
            f"MaskViT transformer, got {type(tokenizer).__name__} with {theirs.time_stride} frames "
            "a slot"
        )
    rows, columns = ours.grid
    stride = theirs.space_stride
    size = (ours.frames, rows * stride, columns * stride)
    return ClipGeometry(*size, (ours.frames, rows, columns), causal=False)


def known_frames(task: Task, geometry: ClipGeometry, goal: bool = False) -> Tensor:
    """bool [T], True where a frame is given: the task's first ones, and the last with a goal.

    Raises:
        ValueError: a task that is not about whole frames, or a goal that the task already has.
    """
    if not isinstance(task, FrameTask) or task.class_conditional:
        raise ValueError(
            f"task: expected frame_prediction or frame_interpolation, a MaskViT transformer knows "
            f"given frames alone; got {task.name}"
        )
    if goal and task.last:
        raise ValueError(f"goal: expected None, task {task.name} takes the last frame from video")
    known = torch.zeros(geometry.frames, dtype=torch.bool)
    known[: task.num_first(geometry)] = True
    known[geometry.frames - (task.last or int(goal)) :] = True
    if known.all():
        raise ValueError(
            f"goal: {int(known.sum())} given frames leave none of {geometry.frames} to predict"
        )
    return known


def checked_actions(
    actions: Tensor | None,
    config: FramePredictorConfig,
    batch: int,
    frames: int,
    device: torch.device,
) -> Tensor | None:
    """Actions as the model wants them, or the error that names both sides.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: missing, superfluous, or not [batch, frames, action_dim] finite numbers.
    """
    width = config.action_dim
    if actions is None:
        if width:
            raise ValueError(
                f"actions: the transformer needs [{batch}, {frames}, {width}] (one row a frame), "
                "got None"
            )
        return None
    if not width:
        raise ValueError("actions: expected None, the transformer was built without actions")
    check_tensor("actions", actions, floating=True)
    if tuple(actions.shape) != (batch, frames, width):
        raise ValueError(
            f"actions: expected [{batch}, {frames}, {width}] (the transformer's {width} numbers a "
            f"frame), got {tuple(actions.shape)}"
        )
    if actions.device != device:
        raise ValueError(f"actions: expected device {device} (the models'), got {actions.device}")
    if not actions.isfinite().all():
        raise ValueError("actions: expected finite numbers, got NaN or infinity")
    return actions


def frame_predict(
    transformer: FramePredictor, frames: int, actions: Tensor | None = None
) -> Predict:
    """The network as masked decoding calls it: flat tokens and mask [B, N] -> logits [B, N, 1, V]."""
    shape = (frames, *transformer.config.grid)

    def predict(tokens: Tensor, mask: Tensor) -> Tensor:
        logits = transformer(tokens.view(-1, *shape), mask.view(-1, *shape), actions=actions)
        return logits.flatten(1, 3).unsqueeze(2)

    return predict


@torch.no_grad()
def decode_frames(
    transformer: FramePredictor,
    ids: Tensor,
    known: Tensor,
    settings: MaskViTDecoding,
    *,
    actions: Tensor | None = None,
    noise: Sequence[Noise] | None = None,
    first_step: int = 0,
) -> Tensor:
    """Fill the frames that are not known: int64 [B, T, h, w], known frames as they came.

    Args:
        transformer: the network; its mode is the caller's (evaluation, usually).
        ids: int64 [B, T, h, w], T up to the model's frames; anything in unknown frames (zeros will
            do).
        known: bool [T].
        settings: passes, schedule, temperatures, seed.
        actions: floating [B, T, A] for a model with actions: row t is taken at frame t.
        noise: one pair a pass in place of the seeded draws: Gumbel [B, N, 1, V] for the values,
            Gumbel [B, N] for the confidence, N = T*h*w (the entries of known tokens are not used).
        first_step: added to the pass number that keys the draws, for decoding in several windows.

    Raises:
        ValueError, TypeError: shapes, dtypes or settings that do not fit; the message names the
            argument.
    """
    grid = transformer.config.grid
    check_tensor("ids", ids)
    if ids.dim() != 4 or tuple(ids.shape[2:]) != tuple(grid):
        raise ValueError(f"ids: expected [B, T, {grid[0]}, {grid[1]}], got {tuple(ids.shape)}")
    frames = ids.shape[1]
    if known.dtype != torch.bool or tuple(known.shape) != (frames,):
        raise ValueError(
            f"known: expected bool ({frames},), one a frame of ids, "
            f"got {known.dtype} {tuple(known.shape)}"
        )
    actions = checked_actions(actions, transformer.config, len(ids), frames, ids.device)
    tokens = decode_masked(
        frame_predict(transformer, frames, actions),
        ids.flatten(1),
        known.to(ids.device).repeat_interleave(grid[0] * grid[1]),
        settings,
        noise=noise,
        first_step=first_step,
    )
    return tokens.view(ids.shape)


def generate_frames(
    tokenizer: Tokenizer,
    transformer: FramePredictor,
    task: Task,
    settings: MaskViTDecoding,
    *,
    video: Tensor | None,
    goal: Tensor | None = None,
    actions: Tensor | None = None,
    frames: int | None = None,
    noise: Sequence[Noise] | None = None,
) -> Iterator[Tensor]:
    """Given frames and what the model makes of the others: videos [B, C, n, H, W] in [0, 1].

    Arguments as in mf.generate, which are looked at now; one piece a window comes when it is asked
    for. A result shorter than the model's clip is decoded at its own length. In a longer one every
    window is given the last tokens of the one before, and the last window is as short as what is
    missing. The given frames come back as the tokenizer reconstructs them.
    """
    geometry = frame_geometry(tokenizer, transformer)
    windows, given = count_windows(task, geometry, frames)
    if frames is not None and windows == 1:
        geometry = replace(geometry, frames=frames, grid=(frames, *geometry.grid[1:]))
    known = known_frames(task, geometry, goal is not None)
    if windows > 1 and (noise is not None or goal is not None):
        raise ValueError(f"noise, goal: expected None for a result of {windows} clips, got one")
    video = checked_video(task, geometry, video)
    assert video is not None  # frame tasks have one, or checked_video raised
    if isinstance(transformer, nn.Module):
        check_devices(tokenizer, transformer, video)
    total = geometry.frames if windows == 1 or frames is None else frames
    actions = checked_actions(actions, transformer.config, len(video), total, video.device)
    context = _context(tokenizer, task, geometry, video, goal)

    def pieces(context: Tensor) -> Iterator[Tensor]:
        for window in range(windows):
            start = window * (geometry.frames - given)
            length = min(geometry.frames, total - start)
            ids = context.new_zeros(len(context), length, *geometry.grid[1:])
            ids[:, known[:length]] = context
            with evaluation(tokenizer, transformer):
                ids = decode_frames(
                    transformer, ids, known[:length], settings, noise=noise,
                    actions=None if actions is None else actions[:, start : start + length],
                    first_step=window * settings.steps,
                )  # fmt: skip
                clip = tokenizer.decode(ids if window == 0 else ids[:, given:])
            context = ids[:, length - given :]
            yield clip

    return pieces(context)


def _context(
    tokenizer: Tokenizer, task: Task, geometry: ClipGeometry, video: Tensor, goal: Tensor | None
) -> Tensor:
    """Tokens of the given frames alone, in order: int64 [B, K, h, w]."""
    assert isinstance(task, FrameTask)  # known_frames has looked
    parts = [video[:, :, : task.num_first(geometry)]]
    if task.last:
        parts.append(video[:, :, video.shape[2] - task.last :])
    if goal is not None:
        check_pixels("goal", goal, geometry)
        expected = (video.shape[0], video.shape[1], geometry.height, geometry.width)
        if tuple(goal.shape) != expected or goal.device != video.device:
            raise ValueError(
                f"goal: expected {expected} (batch and channels of video) on {video.device}, "
                f"got {tuple(goal.shape)} on {goal.device}"
            )
        parts.append(goal.unsqueeze(2).to(video.dtype))
    with evaluation(tokenizer):
        ids = tokenizer.encode(torch.cat(parts, dim=2))
    if tuple(ids.shape[2:]) != geometry.grid[1:]:
        raise ValueError(
            f"transformer: its grid is {geometry.grid[1:]}, but the tokenizer makes "
            f"{tuple(ids.shape[2:])} tokens of a frame of {geometry.height}x{geometry.width}"
        )
    return ids
