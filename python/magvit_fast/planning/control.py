"""Model-predictive control: plan, carry out the first actions, look, plan again.

Source: MaskViT section 4.4. Environments are gymnasium's by shape, gymnasium itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from magvit_fast.ops._checks import check_int
from magvit_fast.planning.cem import CrossEntropyMethod, Plan
from magvit_fast.planning.costs import Objective, cost_of
from magvit_fast.planning.world import History, VideoModel


class Environment(Protocol):
    """gymnasium.Env, as far as it is used here."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...


def to_frame(observation: Any) -> Tensor:
    """An image as a float frame [C, H, W] in [0, 1].

    uint8 [H, W, C] (what environments render) is divided by 255; floating [C, H, W] is taken as it
    is. For other observations give run_episode a function of your own.
    """
    image = torch.as_tensor(
        np.array(observation) if not isinstance(observation, Tensor) else observation
    )
    if image.dim() == 3 and image.dtype == torch.uint8:
        return image.permute(2, 0, 1).float() / 255
    if image.dim() == 3 and image.is_floating_point():
        return image
    raise TypeError(
        "observation: expected an image, uint8 [H, W, C] or floating [C, H, W], "
        f"got {tuple(image.shape)} {image.dtype}; give observe= a function that makes one"
    )


class Controller:
    """A planner, a model and a goal, with the memory that a receding horizon needs.

    Args:
        model: predicts frames or tokens.
        objective: costs of predictions (PixelCost, TokenCost or a function of your own).
        planner: the search.
        execute: actions carried out before it plans again.
        max_batch: candidates predicted at a time.
        warm_start: begin a search at the rest of the last plan (else at the planner's initial mean).
    """

    def __init__(
        self,
        model: VideoModel,
        objective: Objective,
        planner: CrossEntropyMethod,
        *,
        execute: int = 1,
        max_batch: int = 64,
        warm_start: bool = True,
    ) -> None:
        check_int("execute", execute, least=1)
        if execute > planner.horizon:
            raise ValueError(
                f"execute: expected at most the planner's horizon of {planner.horizon}, "
                f"got {execute}"
            )
        self.model, self.objective, self.planner = model, objective, planner
        self.execute, self.max_batch, self.warm_start = execute, max_batch, warm_start
        self.reset()

    def reset(self) -> None:
        """Forget the last plan and start the draws again from the planner's seed."""
        self._mean: Tensor | None = None
        self._generator = torch.Generator().manual_seed(self.planner.seed)

    def plan(self, history: History) -> Plan:
        """The plan from here; the first `execute` of its actions are to be carried out."""
        cost = cost_of(self.objective, self.model, history, max_batch=self.max_batch)
        plan = self.planner.plan(cost, mean=self._mean, generator=self._generator)
        if self.warm_start:
            self._mean = self.planner.shifted(plan.mean, self.execute)
        return plan


@dataclass(frozen=True)
class Episode:
    """What happened, over N steps.

    frames: float [C, N + 1, H, W]; actions: float [N, A], as carried out; planned: [N, A], as the
    planner wanted them (the same unless the environment reported otherwise).
    rewards: the environment's, N of them. plans: one for each time it planned.
    """

    frames: Tensor
    actions: Tensor
    planned: Tensor
    rewards: tuple[float, ...]
    plans: tuple[Plan, ...]
    terminated: bool
    truncated: bool


def run_episode(
    env: Environment,
    controller: Controller,
    *,
    steps: int,
    seed: int | None = None,
    observe: Callable[[Any], Tensor] = to_frame,
    act: Callable[[Tensor], Any] | None = None,
) -> Episode:
    """Control an environment until it ends, or for `steps` steps.

    Args:
        env: reset(seed=...) -> (observation, info), step(action) -> (observation, reward, terminated,
            truncated, info). Where info has "executed_action", that one enters the history in place
            of the planned one (recorded clips, robots that cut actions short).
        controller: is reset first.
        steps: at most.
        seed: of the environment.
        observe: observation -> float [C, H, W] in [0, 1], of the model's size.
        act: action float32 [A] -> what env.step takes; None = a numpy array.
    """
    check_int("steps", steps, least=1)
    controller.reset()
    observation, _ = env.reset(seed=seed)
    frames = [observe(observation)]
    actions, planned, waiting = list[Tensor](), list[Tensor](), list[Tensor]()
    rewards, plans = list[float](), list[Plan]()
    terminated = truncated = False
    width = controller.planner.action_dim
    while len(actions) < steps and not (terminated or truncated):
        if not waiting:
            done = torch.stack(actions) if actions else torch.zeros(0, width)
            plans.append(controller.plan(History(torch.stack(frames, 1), done)))
            waiting = list(plans[-1].actions[: controller.execute])
        action = waiting.pop(0)
        command = action.numpy() if act is None else act(action)
        observation, reward, terminated, truncated, info = env.step(command)
        executed = info.get("executed_action", action)
        frames.append(observe(observation))
        actions.append(torch.as_tensor(executed, dtype=torch.float32))
        planned.append(action)
        rewards.append(float(reward))
    return Episode(
        torch.stack(frames, 1), torch.stack(actions), torch.stack(planned), tuple(rewards),
        tuple(plans), bool(terminated), bool(truncated),
    )  # fmt: skip
