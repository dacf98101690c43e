"""The cross-entropy method on problems whose optimum is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from magvit_fast.planning import CrossEntropyMethod

TARGET = torch.tensor([[0.7, -0.3], [0.2, 0.9], [-0.8, 0.1]])


def quadratic(actions: torch.Tensor) -> torch.Tensor:
    return (actions - TARGET).square().sum((1, 2))


def search(**changes: Any) -> CrossEntropyMethod:
    defaults = {
        "horizon": 3, "action_dim": 2, "population": 200, "elites": 20, "iterations": 15,
    }  # fmt: skip
    return CrossEntropyMethod(**{**defaults, **changes})


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_of_a_quadratic(seed: int) -> None:
    plan = search(seed=seed).plan(quadratic)
    assert plan.cost < 1e-4
    torch.testing.assert_close(plan.actions, TARGET, atol=0.02, rtol=0)
    torch.testing.assert_close(plan.mean, TARGET, atol=0.02, rtol=0)
    assert plan.cost == pytest.approx(float(quadratic(plan.actions[None])), abs=1e-9)
    assert plan.history[-1] < 1e-3 * plan.history[0]
    assert len(plan.history) == 15


@pytest.mark.parametrize("seed", range(5))
def test_bounds_put_the_optimum_on_the_border(seed: int) -> None:
    seen = []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions)
        return quadratic(actions)

    plan = search(low=(-0.5, -0.2), high=(0.5, 0.4), seed=seed).plan(cost)
    expected = TARGET.clamp(torch.tensor([-0.5, -0.2]), torch.tensor([0.5, 0.4]))
    torch.testing.assert_close(plan.actions, expected, atol=0.02, rtol=0)
    every = torch.cat(seen).flatten(0, 1)
    assert (every >= torch.tensor([-0.5, -0.2])).all()
    assert (every <= torch.tensor([0.5, 0.4])).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_constraint_given_as_infinite_cost(seed: int) -> None:
    """Least distance to (2, 2) inside the unit disc: the point (1, 1) / sqrt(2)."""

    def cost(actions: torch.Tensor) -> torch.Tensor:
        point = actions[:, 0]
        return torch.where(point.norm(dim=-1) <= 1.0, (point - 2.0).square().sum(-1), torch.inf)

    plan = search(horizon=1, population=400, elites=40, iterations=20, seed=seed).plan(cost)
    torch.testing.assert_close(plan.actions[0], torch.full((2,), 0.5**0.5), atol=0.03, rtol=0)
    assert plan.actions[0].norm() <= 1.0


def test_nothing_allowed_leaves_the_distribution_alone() -> None:
    plan = search(iterations=3).plan(lambda actions: torch.full((len(actions),), math.inf))
    assert plan.cost == math.inf
    assert torch.equal(plan.actions, torch.zeros(3, 2))
    assert torch.equal(plan.mean, torch.zeros(3, 2))
    assert torch.equal(plan.std, torch.ones(3, 2))


def test_one_iteration_by_hand() -> None:
    noise = torch.tensor([[[[1.0]], [[-2.0]], [[0.5]], [[3.0]]]])  # 1 iteration, 4 candidates
    method = CrossEntropyMethod(
        1, 1, population=4, elites=2, iterations=1, initial_mean=1.0, initial_std=2.0, momentum=0.25
    )
    plan = method.plan(lambda actions: actions[:, 0, 0].abs(), noise=noise)
    # candidates 3, -3, 2, 7; elites 2 and 3 (of equals the first)
    assert plan.actions.tolist() == [[2.0]]
    assert plan.cost == 2.0
    assert plan.mean.tolist() == [[0.25 * 1.0 + 0.75 * 2.5]]
    assert plan.std.tolist() == [[0.25 * 2.0 + 0.75 * 0.5]]


def test_smooth_noise_has_the_full_deviation_and_the_stated_correlation() -> None:
    seen = []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions)
        return quadratic(actions)

    method = search(population=20000, elites=20, iterations=1, smoothness=0.8)
    method.plan(cost)
    drawn = seen[0][:, :, 0]  # [P, 3]
    torch.testing.assert_close(drawn.std(0), torch.ones(3), atol=0.03, rtol=0)
    correlation = torch.corrcoef(drawn.T)
    assert float(correlation[0, 1]) == pytest.approx(0.8, abs=0.02)
    assert float(correlation[0, 2]) == pytest.approx(0.64, abs=0.03)


def test_the_deviation_has_a_floor() -> None:
    assert search(iterations=40).plan(quadratic).std.max() < 1e-3
    assert search(iterations=40, min_std=0.05).plan(quadratic).std.min() >= 0.05


def test_seeds_and_generators() -> None:
    method = search(iterations=3)
    first = method.plan(quadratic)
    again = method.plan(quadratic)
    assert torch.equal(first.actions, again.actions)
    assert first.history == again.history
    assert not torch.equal(first.actions, search(iterations=3, seed=1).plan(quadratic).actions)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(method.plan(quadratic, generator=generator).actions, first.actions)
    assert not torch.equal(method.plan(quadratic, generator=generator).actions, first.actions)


def test_a_warm_start_is_the_rest_of_the_old_plan() -> None:
    method = search(initial_mean=(0.1, 0.2), high=0.5)
    torch.testing.assert_close(method.shifted(TARGET, 1)[:2], TARGET[1:])
    torch.testing.assert_close(method.shifted(TARGET, 1)[2], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(method.shifted(TARGET, 5), method.start())
    short = search(iterations=2, initial_std=0.1)
    assert short.plan(quadratic, mean=TARGET).cost < 0.5 * short.plan(quadratic).cost


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "horizon: expected 1 or more, got 0"),
        ({"population": 2.5}, TypeError, "population: expected an int, got float 2.5"),
        ({"elites": 300}, ValueError, "elites: expected at most the population of 200, got 300"),
        ({"initial_std": 0.0}, ValueError, "initial_std: expected positive numbers, got 0.0"),
        (
            {"initial_mean": (1.0,)},
            ValueError,
            r"initial_mean: expected one number or 2 .*\(1.0,\)",
        ),
        ({"initial_mean": "a"}, TypeError, "initial_mean: expected a number or a tuple, got 'a'"),
        (
            {"low": 1.0, "high": (2.0, 0.5)},
            ValueError,
            r"low: expected at most high = \(2.0, 0.5\)",
        ),
        ({"low": math.nan}, ValueError, "low: expected finite numbers, got nan"),
        ({"momentum": 1.0}, ValueError, r"momentum: expected a value in \[0, 1\), got 1.0"),
        ({"smoothness": -0.1}, ValueError, r"smoothness: expected a value in \[0, 1\)"),
        ({"min_std": -1.0}, ValueError, "min_std: expected a finite number, 0 or more"),
    ],
)
def test_bad_settings(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(**changes)


def test_bad_arguments_of_a_search() -> None:
    method = search()
    with pytest.raises(ValueError, match=r"mean: expected \(3, 2\) .* got \(2, 2\)"):
        method.plan(quadratic, mean=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"cost: expected \[200\] from it, got \(200, 3\)"):
        method.plan(lambda actions: actions.sum(-1))
    with pytest.raises(TypeError, match="cost: expected it to return a Tensor, got float"):
        method.plan(lambda actions: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"cost: expected numbers .* got NaN"):
        method.plan(lambda actions: quadratic(actions) * math.nan)
    with pytest.raises(ValueError, match="noise: expected 15 arrays, got 1"):
        method.plan(quadratic, noise=torch.zeros(1, 200, 3, 2))
    with pytest.raises(ValueError, match=r"noise: expected \(200, 3, 2\) an iteration"):
        method.plan(quadratic, noise=torch.zeros(15, 100, 3, 2))
