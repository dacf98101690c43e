"""The cross-entropy method: search over action sequences by a Gaussian that follows the best ones.

Source: Rubinstein 1999; as MaskViT plans with it (section 4.4: model-predictive control by CEM), with
the options of planners of its kind (VP2): momentum on the mean and noise that is smooth over time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magvit_fast.ops._checks import check_int, check_number

# Action sequences [P, H, A] -> costs [P], lower is better; infinity = not allowed.
Cost = Callable[[Tensor], Tensor]
PerAction = float | tuple[float, ...]


@dataclass(frozen=True)
class CrossEntropyMethod:
    """The search. Sequences are [H, A]: H steps ahead, A numbers a step, in the actions' own units.

    Every iteration draws `population` sequences around the mean, scores them, and moves mean and
    deviation to those of the `elites` best.

    horizon, action_dim: H and A.
    population, elites, iterations: sizes of the search.
    initial_mean, initial_std: of every action at first: one number, or one for each of the A.
    low, high: bounds; sequences are cut to them before they are scored. One number or A.
    momentum: m in mean = m * old + (1 - m) * elites' mean, and the same for the deviation; 0 = none.
    smoothness: b in n[t] = b * n[t-1] + sqrt(1 - b**2) * white noise: neighboring actions of a
        candidate deviate alike, each still with the full deviation; 0 = independent.
    min_std: the deviation never falls below it, so that the search does not freeze early.
    seed: of the draws where plan() is given no generator.
    """

    horizon: int
    action_dim: int
    population: int = 200
    elites: int = 20
    iterations: int = 4
    initial_mean: PerAction = 0.0
    initial_std: PerAction = 1.0
    low: PerAction = -math.inf
    high: PerAction = math.inf
    momentum: float = 0.0
    smoothness: float = 0.0
    min_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("horizon", "action_dim", "population", "elites", "iterations"):
            check_int(name, getattr(self, name), least=1)
        check_int("seed", self.seed, least=0)
        check_number("min_std", self.min_std, least=0.0)
        if self.elites > self.population:
            raise ValueError(
                f"elites: expected at most the population of {self.population}, got {self.elites}"
            )
        for name in ("momentum", "smoothness"):
            if not 0.0 <= check_number(name, getattr(self, name)) < 1.0:
                raise ValueError(f"{name}: expected a value in [0, 1), got {getattr(self, name)}")
        for name in ("initial_mean", "initial_std", "low", "high"):
            self._per_action(name)
        if (self._per_action("initial_std") <= 0).any():
            raise ValueError(f"initial_std: expected positive numbers, got {self.initial_std}")
        low, high = self._per_action("low"), self._per_action("high")
        if not (low <= high).all():
            raise ValueError(f"low: expected at most high = {self.high}, got {self.low}")

    def _per_action(self, name: str) -> Tensor:
        value = getattr(self, name)
        numbers = value if isinstance(value, (tuple, list)) else (value,) * self.action_dim
        try:
            row = torch.tensor([float(v) for v in numbers], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected a number or a tuple, got {value!r}") from error
        if len(row) != self.action_dim:
            raise ValueError(
                f"{name}: expected one number or {self.action_dim} (action_dim), got {value}"
            )
        bound = name in ("low", "high")
        if row.isnan().any() or (not bound and row.isinf().any()):
            raise ValueError(f"{name}: expected finite numbers, got {value}")
        return row

    def start(self) -> Tensor:
        """The first mean: float32 [H, A], on the CPU as all of the search."""
        return self._bounded(self._per_action("initial_mean").expand(self.horizon, -1))

    def shifted(self, mean: Tensor, steps: int = 1) -> Tensor:
        """A warm start after `steps` actions were carried out: the rest, then initial_mean."""
        check_int("steps", steps, least=0)
        return torch.cat([mean[steps:], self.start()[: min(steps, self.horizon)]])

    def draw(self, mean: Tensor, generator: torch.Generator) -> Tensor:
        """The candidates [P, H, A] of a first iteration around `mean` [H, A]."""
        shape = (self.population, self.horizon, self.action_dim)
        spread = self._per_action("initial_std")
        return self._candidates(mean, spread, torch.randn(shape, generator=generator))

    def _candidates(self, mean: Tensor, std: Tensor, white: Tensor) -> Tensor:
        return self._bounded(mean + std * self._smooth(white))

    def _bounded(self, actions: Tensor) -> Tensor:
        return actions.clamp(self._per_action("low"), self._per_action("high"))

    @torch.no_grad()
    def plan(
        self,
        cost: Cost,
        *,
        mean: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Sequence[Tensor] | Tensor | None = None,
    ) -> Plan:
        """Search for the sequence of least cost.

        Args:
            cost: float32 [P, H, A] on the CPU -> [P], on any device. Infinite where a sequence is
                not allowed: such ones are never elites, and while all are, the distribution stays
                as it is.
            mean: [H, A] to start from, as `shifted` makes it; None = initial_mean.
            generator: of the draws, a CPU one; None = one with `seed`.
            noise: [iterations, P, H, A] standard normal numbers in place of the draws.

        Raises:
            ValueError, TypeError: shapes that do not fit; costs that are not [P] or hold NaN.
        """
        shape = (self.population, self.horizon, self.action_dim)
        center = self._checked_mean(mean)
        spread = self._per_action("initial_std").expand_as(center)
        if noise is not None and len(noise) != self.iterations:
            raise ValueError(f"noise: expected {self.iterations} arrays, got {len(noise)}")
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        best, best_cost, history = center, math.inf, []
        for i in range(self.iterations):
            white = torch.randn(shape, generator=generator) if noise is None else noise[i]
            if tuple(white.shape) != shape:
                raise ValueError(f"noise: expected {shape} an iteration, got {tuple(white.shape)}")
            candidates = self._candidates(center, spread, white)
            costs = _checked_costs(cost(candidates), self.population)
            order = costs.argsort(stable=True)
            history.append(float(costs[order[0]]))
            if history[-1] < best_cost:
                best, best_cost = candidates[order[0]], history[-1]
            allowed = candidates[order[: self.elites]][costs[order[: self.elites]].isfinite()]
            if len(allowed):
                center, spread = self._follow(allowed, center, spread)
        return Plan(best, best_cost, center, spread, tuple(history))

    def _follow(self, elites: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        m = self.momentum
        new_mean = m * mean + (1 - m) * elites.mean(0)
        new_std = m * std + (1 - m) * elites.std(0, correction=0)
        return new_mean, new_std.clamp(min=self.min_std)

    def _smooth(self, white: Tensor) -> Tensor:
        if self.smoothness == 0:
            return white
        b, rows = self.smoothness, [white[:, 0]]
        for t in range(1, self.horizon):
            rows.append(b * rows[-1] + math.sqrt(1 - b * b) * white[:, t])
        return torch.stack(rows, dim=1)

    def _checked_mean(self, mean: Tensor | None) -> Tensor:
        if mean is None:
            return self.start()
        shape = (self.horizon, self.action_dim)
        if tuple(mean.shape) != shape:
            raise ValueError(
                f"mean: expected {shape} (horizon, action_dim), got {tuple(mean.shape)}"
            )
        return self._bounded(mean.to("cpu", torch.float32))


@dataclass(frozen=True)
class Plan:
    """What a search found.

    actions: float32 [H, A], the best sequence that was scored; cost: its cost (infinite if none was
    allowed: then actions is the mean that the search began with).
    mean, std: [H, A], the distribution after the last iteration.
    history: the best cost of each iteration.
    """

    actions: Tensor
    cost: float
    mean: Tensor
    std: Tensor
    history: tuple[float, ...]


def _checked_costs(costs: Tensor, population: int) -> Tensor:
    if not isinstance(costs, Tensor):
        raise TypeError(f"cost: expected it to return a Tensor, got {type(costs).__name__}")
    if tuple(costs.shape) != (population,):
        raise ValueError(f"cost: expected [{population}] from it, got {tuple(costs.shape)}")
    costs = costs.detach().to("cpu", torch.float32)
    if costs.isnan().any() or (costs == -math.inf).any():
        raise ValueError("cost: expected numbers (infinity = not allowed), got NaN or -infinity")
    return costs
