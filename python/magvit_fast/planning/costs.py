"""What a planner wants: distance of the predicted future to a goal image, in pixels or tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from magvit_fast.ops._checks import check_choice, check_int, check_tensor
from magvit_fast.planning.cem import Cost
from magvit_fast.planning.world import History, TokenModel, VideoModel

# Which predicted frames count: all alike, the last alone, or one weight for each of them.
Weights = Literal["mean", "last"] | tuple[float, ...]
TokenDistance = Literal["mismatch", "embedding", "likelihood"]


class Objective(Protocol):
    """Costs [P] of action sequences [P, H, A] from a history."""

    def __call__(self, model: Any, history: History, actions: Tensor) -> Tensor: ...


def mean_squared_error(frames: Tensor, goal: Tensor) -> Tensor:
    """Frames [P, C, H, h, w] against a goal [C, h, w], in squared pixel units: [P, H]."""
    return (frames - goal.unsqueeze(1)).square().mean((1, 3, 4))


@dataclass(frozen=True)
class PixelCost:
    """Distance of predicted frames to a goal image in pixel space.

    goal: float [C, h, w] in [0, 1].
    distance: (frames [P, C, H, h, w], goal) -> [P, H], lower is nearer; mean squared error by
        default (a perceptual distance or a classifier fits as well).
    weights: which frames count; a tuple of H numbers, or "mean" or "last".
    """

    goal: Tensor
    distance: Callable[[Tensor, Tensor], Tensor] = mean_squared_error
    weights: Weights = "mean"

    def __post_init__(self) -> None:
        check_tensor("goal", self.goal, ndim=3, floating=True)

    def __call__(self, model: VideoModel, history: History, actions: Tensor) -> Tensor:
        """Costs [P] of actions [P, H, A]."""
        frames = model.predict(history, actions)
        if frames.shape[3:] != self.goal.shape[1:]:
            raise ValueError(
                f"goal: expected {frames.shape[3]}x{frames.shape[4]} pixels (the model's), "
                f"got {self.goal.shape[1]}x{self.goal.shape[2]}"
            )
        distances = self.distance(frames, self.goal.to(frames))
        return distances @ frame_weights(self.weights, actions.shape[1]).to(distances)


@dataclass(frozen=True)
class TokenCost:
    """Distance of predicted tokens to those of a goal image; nothing is decoded to pixels.

    goal: float [C, h, w] in [0, 1].
    distance: "mismatch", the fraction of tokens that differ; "embedding", the squared distance of
        their codes, mean over tokens; "likelihood", minus the mean log-probability that the model
        gives the goal's tokens in the frames that count (nats; the others are predicted first).
    weights: as PixelCost.
    """

    goal: Tensor
    distance: TokenDistance = "embedding"
    weights: Weights = "mean"

    def __post_init__(self) -> None:
        check_tensor("goal", self.goal, ndim=3, floating=True)
        check_choice("distance", self.distance, get_args(TokenDistance))

    def __call__(self, model: TokenModel, history: History, actions: Tensor) -> Tensor:
        """Costs [P] of actions [P, H, A]."""
        goal = model.encode(self.goal)
        weights = frame_weights(self.weights, actions.shape[1])
        if self.distance == "likelihood":
            distances = -model.log_likelihood(history, actions, goal, weights != 0)
        elif self.distance == "mismatch":
            ids = model.predict_ids(history, actions)
            distances = (ids != goal).float().mean((2, 3))
        else:
            codes = model.embed(model.predict_ids(history, actions))
            distances = (codes - model.embed(goal)).square().sum(-1).mean((2, 3))
        return distances @ weights.to(distances)


def frame_weights(weights: Weights, horizon: int) -> Tensor:
    """float32 [H]. Raises ValueError for another number of weights or an unknown name."""
    if weights == "mean":
        return torch.full((horizon,), 1.0 / horizon)
    if weights == "last":
        return torch.eye(horizon)[-1]
    if isinstance(weights, str) or len(weights) != horizon:
        raise ValueError(f"weights: expected 'mean', 'last' or {horizon} numbers, got {weights!r}")
    return torch.tensor(weights, dtype=torch.float32)


def cost_of(
    objective: Objective, model: VideoModel, history: History, *, max_batch: int = 64
) -> Cost:
    """The cost function that a planner minimizes: [P, H, A] -> [P].

    Candidates are scored at most max_batch at a time, which bounds the memory; history may be longer
    or shorter than the model's context.
    """
    check_int("max_batch", max_batch, least=1)
    recent = history.last(model.context)

    def cost(actions: Tensor) -> Tensor:
        return torch.cat([objective(model, recent, part) for part in actions.split(max_batch)])

    return cost
