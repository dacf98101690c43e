"""MaskViT's iterative decoding: given frames stay, all others start as MASK and fill in a few passes.

Source: MaskViT (arXiv 2206.11894), section 3.3 and its table of forward passes; its code is not
public. In every pass all masked tokens are predicted, n = ceil(g(t / T) * N) of the N future ones
stay masked, those of least confidence, and what is kept stays kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
