"""Model-predictive control with models that know their world."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.planning.block_world import (
    STEP,
    BlockWorld,
    Cells,
    KnowsTheBlock,
    KnowsTheCells,
    cell_frame,
    render,
)

from magvit_fast.models import (
    FrameTokenizer,
    FrameTokenizerConfig,
    MaskViTConfig,
    MaskViTTransformer,
)
from magvit_fast.planning import (
    Controller,
    CrossEntropyMethod,
    History,
    MaskViTModel,
    PixelCost,
    TokenCost,
    cost_of,
    run_episode,
    to_frame,
)
from magvit_fast.planning.costs import TokenDistance

PLANNER = CrossEntropyMethod(
    horizon=6, action_dim=2, population=150, elites=10, iterations=4, initial_std=0.1, low=-STEP,
    high=STEP, smoothness=0.7,
)  # fmt: skip
PLACES = [
    ((0.2, 0.2), (0.75, 0.7)),
    ((0.8, 0.3), (0.25, 0.6)),
    ((0.5, 0.8), (0.5, 0.25)),
    ((0.3, 0.7), (0.7, 0.75)),
]


def controlled(world: BlockWorld, seed: int = 0, **options: Any) -> Any:
    planner = dataclasses.replace(PLANNER, seed=seed)
    controller = Controller(KnowsTheBlock(), PixelCost(render(world.goal)), planner, **options)
    return run_episode(world, controller, steps=16)


def test_reaches_its_goal_and_beats_random_actions() -> None:
    """Within 0.05 of every goal, and at most a quarter of the distance that random actions leave."""
    generator = torch.Generator().manual_seed(0)
    ours, random = [], []
    for seed, (start, goal) in enumerate(PLACES):
        world = BlockWorld(start, goal)
        episode = controlled(world, seed)
        ours.append(world.distance())
        assert episode.frames.shape == (3, len(episode.actions) + 1, 24, 24)
        assert len(episode.rewards) == len(episode.actions) <= 16
        assert torch.equal(episode.actions, episode.planned)
        assert (episode.actions.abs() <= STEP).all()
        for _ in range(5):
            world.reset()
            for _ in range(16):
                action = (2 * torch.rand(2, generator=generator) - 1) * STEP
                world.step(action.numpy())
            random.append(world.distance())
    assert max(ours) < 0.05
    assert np.mean(ours) < np.mean(random) / 4


def test_same_seed_same_episode() -> None:
    episodes = [controlled(BlockWorld(*PLACES[0]), seed) for seed in (3, 3, 4)]
    assert torch.equal(episodes[0].actions, episodes[1].actions)
    assert not torch.equal(episodes[0].actions[:3], episodes[2].actions[:3])


def test_a_controller_can_be_used_again() -> None:
    world = BlockWorld(*PLACES[1])
    controller = Controller(KnowsTheBlock(), PixelCost(render(world.goal)), PLANNER)
    first, second = (run_episode(world, controller, steps=4) for _ in range(2))
    assert torch.equal(first.actions, second.actions)


def test_the_horizon_recedes_from_the_last_plan() -> None:
    """With a warm start a search of one iteration is as good as several from nothing."""
    small = dataclasses.replace(PLANNER, iterations=1, population=40, elites=4)

    def last_cost(warm: bool) -> float:
        world = BlockWorld(*PLACES[0])
        costs = []
        for seed in range(4):
            planner = dataclasses.replace(small, seed=seed)
            controller = Controller(
                KnowsTheBlock(), PixelCost(render(world.goal)), planner, warm_start=warm
            )
            costs.append(run_episode(world, controller, steps=6).plans[-1].cost)
        return float(np.mean(costs))

    assert last_cost(True) < 0.7 * last_cost(False)


def test_the_next_search_begins_at_the_rest_of_the_plan() -> None:
    world = BlockWorld(*PLACES[0])
    model = KnowsTheBlock()
    controller = Controller(model, PixelCost(render(world.goal)), PLANNER, execute=2)
    history = History(to_frame(world.reset()[0])[:, None], torch.zeros(0, 2))
    plan = controller.plan(history)
    generator = torch.Generator().manual_seed(0)
    for _ in range(PLANNER.iterations):
        torch.randn(150, 6, 2, generator=generator)
    cost = cost_of(controller.objective, model, history)
    expected = PLANNER.plan(cost, mean=PLANNER.shifted(plan.mean, 2), generator=generator)
    assert torch.equal(controller.plan(history).actions, expected.actions)


def test_several_actions_of_a_plan_are_carried_out() -> None:
    episode = controlled(BlockWorld(*PLACES[2]), execute=3)
    assert len(episode.plans) == -(-len(episode.actions) // 3)
    assert torch.equal(episode.actions[:3], episode.plans[0].actions[:3])


def test_candidates_are_scored_in_pieces() -> None:
    model = KnowsTheBlock()
    history = History(render(torch.tensor([[0.3, 0.4]])).transpose(0, 1), torch.zeros(0, 2))
    goal = PixelCost(render(torch.tensor([0.6, 0.6])))
    actions = 0.1 * torch.randn(50, 6, 2, generator=torch.Generator().manual_seed(1))
    whole = cost_of(goal, model, history, max_batch=64)(actions)
    assert model.batches == [50]
    torch.testing.assert_close(cost_of(goal, model, history, max_batch=16)(actions), whole)
    assert model.batches == [50, 16, 16, 16, 2]


# --- MaskViT's decoding in the loop, tokens by a hand-written transformer -------------------------


def masked_model(context: int = 2) -> MaskViTModel:
    return MaskViTModel(Cells(), KnowsTheCells(), context=context)


def cell_history(x: int, y: int) -> History:
    return History(cell_frame(x, y)[:, None], torch.zeros(0, 2)).last(2)


def test_predictions_follow_the_actions() -> None:
    model = masked_model()
    actions = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0]] * 3])
    ids = model.predict_ids(cell_history(2, 3), actions)
    assert ids.shape == (2, 3, 8, 8)
    for t, place in enumerate([(3, 3), (4, 3), (4, 5)]):
        assert torch.equal(ids[0, t], model.encode(cell_frame(*place)))
        assert torch.equal(ids[1, t], model.encode(cell_frame(2, 3)))
    assert model.transformer.passes == 5  # VP2: five passes
    frames = model.predict(cell_history(2, 3), actions)
    assert frames.shape == (2, 3, 3, 32, 32)
    assert torch.equal(frames[0, :, 2], cell_frame(4, 5))


def test_past_actions_and_frames_keep_their_rows() -> None:
    """Row t of the transformer's actions is taken at frame t; the last row is idle."""
    seen = []
    model = masked_model()
    model.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["actions"]), with_kwargs=True
    )
    history = History(
        torch.stack([cell_frame(2, 2), cell_frame(3, 2)], 1), torch.tensor([[1.0, 0.0]])
    )
    model.predict_ids(history, torch.tensor([[[0.0, 1.0], [0.0, 2.0]]]))
    assert seen[0].tolist() == [[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]]]


@pytest.mark.parametrize("distance", ["mismatch", "embedding", "likelihood"])
@pytest.mark.parametrize("weights", ["mean", "last"])
def test_plans_in_token_space(distance: Any, weights: Any) -> None:
    planner = CrossEntropyMethod(
        horizon=3, action_dim=2, population=80, elites=10, iterations=4, low=-2.0, high=2.0,
        initial_std=1.5,
    )  # fmt: skip
    model, goal = masked_model(), cell_frame(5, 4)
    cost = cost_of(TokenCost(goal, distance, weights), model, cell_history(2, 2))
    plan = planner.plan(cost)
    end = model.predict_ids(cell_history(2, 2), plan.actions[None])[0, -1]
    assert (end != model.encode(goal)).float().mean() <= 2 / 64  # a start leaves 17 of 64 wrong
    assert plan.cost < 0.6 * float(cost(torch.zeros(1, 3, 2)))


def test_token_costs_by_hand() -> None:
    model, history, goal = masked_model(), cell_history(2, 2), cell_frame(3, 2)
    still = torch.zeros(1, 2, 2)
    differing = float((model.encode(goal) != model.encode(cell_frame(2, 2))).sum())
    assert differing == 6  # two columns of three cells
    cost = lambda *a: float(TokenCost(goal, *a)(model, history, still))  # noqa: E731
    assert cost("mismatch") == pytest.approx(6 / 64)
    assert cost("embedding") == pytest.approx(6 * 5 / 64)  # |(1, 2)|**2 = 5
    assert cost("mismatch", (0.5, 2.0)) == pytest.approx(2.5 * 6 / 64)
    logits = model.transformer(
        model.encode(cell_frame(2, 2)).expand(1, 2, 8, 8),
        torch.tensor([False, True]).view(1, 2, 1, 1).expand(1, 2, 8, 8),
        actions=torch.zeros(1, 2, 2),
    )[0, 1]
    expected = -logits.log_softmax(-1).gather(-1, model.encode(goal)[..., None]).mean()
    assert cost("likelihood", "last") == pytest.approx(float(expected), rel=1e-5)
    assert cost("likelihood", "mean") == pytest.approx(float(expected), rel=1e-5)


def test_an_episode_in_tokens() -> None:
    class CellWorld:
        def reset(self, *, seed: int | None = None) -> Any:
            self.place = torch.tensor([2.0, 5.0])
            return self._frame(), {}

        def _frame(self) -> torch.Tensor:
            return cell_frame(*(int(v) for v in self.place.round()))

        def step(self, action: torch.Tensor) -> Any:
            self.place = (self.place + action.clamp(-1.5, 1.5)).clamp(0, 7)
            return self._frame(), 0.0, False, False, {}

    world = CellWorld()
    planner = CrossEntropyMethod(
        horizon=4,
        action_dim=2,
        population=80,
        elites=10,
        iterations=3,
        low=-1.5,
        high=1.5,
        smoothness=0.7,
    )
    controller = Controller(
        masked_model(), TokenCost(cell_frame(5, 2), "likelihood"), planner, max_batch=25
    )
    run_episode(world, controller, steps=6, act=lambda action: action)
    assert (world.place - torch.tensor([5.0, 2.0])).abs().max() < 1.0


def real_pair() -> tuple[FrameTokenizer, MaskViTTransformer]:
    """Untrained: 32 x 32 pixels -> 8 x 8 tokens of 4 bits, 6 frames, actions of 2 numbers."""
    torch.manual_seed(0)
    tokenizer = FrameTokenizer(
        FrameTokenizerConfig(
            filters=4, channel_multipliers=(1, 1, 2), num_res_blocks=1, norm_groups=2,
            codebook_size=16, embedding_dim=4,
        )
    )  # fmt: skip
    transformer = MaskViTTransformer(
        MaskViTConfig(
            frames=6, grid=(8, 8), window=(4, 4), codebook_size=16, action_dim=2, hidden_size=16,
            num_blocks=1, num_heads=2, mlp_size=32, init_std=0.5,
        )
    )  # fmt: skip
    return tokenizer, transformer


def test_the_real_pair_plans() -> None:
    tokenizer, transformer = real_pair()
    model = MaskViTModel(tokenizer, transformer, context=2)
    actions = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    frames = model.predict(cell_history(2, 2), actions)
    assert frames.shape == (6, 3, 3, 32, 32)
    assert 0 <= frames.min() <= frames.max() <= 1
    assert len(model.predict_ids(cell_history(2, 2), actions).flatten(1).unique(dim=0)) > 1
    assert model.embed(model.encode(cell_frame(2, 2))).shape == (8, 8, 4)
    small = CrossEntropyMethod(3, 2, population=6, elites=2, iterations=2)
    goal = cell_frame(5, 5)
    for objective in (PixelCost(goal), *(TokenCost(goal, d) for d in get_args(TokenDistance))):
        plan = small.plan(cost_of(objective, model, cell_history(2, 2), max_batch=4))
        assert 0 < plan.cost < math.inf
        assert plan.actions.shape == (3, 2)
    assert transformer.training  # modes are left as they were
    assert tokenizer.training


@pytest.mark.cuda
def test_the_real_pair_plans_on_a_gpu() -> None:
    """Observations stay on the CPU; a near tie of two tokens may fall differently there."""
    tokenizer, transformer = real_pair()
    actions = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    ids = []
    for device in ("cpu", "cuda"):
        model = MaskViTModel(tokenizer.to(device), transformer.to(device), context=2)
        ids.append(model.predict_ids(cell_history(2, 2), actions))
        assert ids[-1].device.type == device
    assert (ids[0] == ids[1].cpu()).float().mean() > 0.9
    small = CrossEntropyMethod(3, 2, population=6, elites=2, iterations=2)
    for objective in (PixelCost(cell_frame(5, 5)), TokenCost(cell_frame(5, 5), "likelihood")):
        plan = small.plan(cost_of(objective, model, cell_history(2, 2)))
        assert plan.actions.device.type == "cpu"
        assert 0 < plan.cost < math.inf


# --- bad input ------------------------------------------------------------------------------------


def test_bad_models_and_histories() -> None:
    with pytest.raises(ValueError, match=r"context: expected fewer frames than .* 6, got 6"):
        masked_model(context=6)
    lifeless = KnowsTheCells()
    lifeless.config = dataclasses.replace(lifeless.config, action_dim=0)
    with pytest.raises(
        ValueError, match="transformer: expected one with actions, got action_dim 0"
    ):
        MaskViTModel(Cells(), lifeless)
    model = masked_model()
    with pytest.raises(
        ValueError, match=r"actions: expected \[P, H, 2\] with H in 1..4 .* \(1, 5, 2"
    ):
        model.predict_ids(cell_history(2, 2), torch.zeros(1, 5, 2))
    with pytest.raises(
        ValueError, match="history: expected 2 frames and actions of 2 numbers, got 1"
    ):
        model.predict_ids(cell_history(2, 2).last(1), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"frames: expected 32x32 pixels .* got 24x24"):
        model.encode(torch.zeros(3, 24, 24))
    with pytest.raises(ValueError, match="actions: expected one fewer than the 3 frames, got 3"):
        History(torch.zeros(3, 3, 8, 8), torch.zeros(3, 2))


def test_bad_costs_controllers_and_observations() -> None:
    model, history = masked_model(), cell_history(2, 2)
    with pytest.raises(ValueError, match="distance: expected one of 'mismatch', 'embedding'"):
        TokenCost(cell_frame(1, 1), "cosine")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="weights: expected 'mean', 'last' or 2 numbers, got 'first'"
    ):
        PixelCost(cell_frame(1, 1), weights="first")(model, history, torch.zeros(1, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"goal: expected 32x32 pixels .* got 24x24"):
        PixelCost(torch.zeros(3, 24, 24))(model, history, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="execute: expected at most the planner's horizon of 6"):
        Controller(model, PixelCost(cell_frame(1, 1)), PLANNER, execute=7)
    with pytest.raises(TypeError, match=r"observation: expected an image, .* give observe="):
        to_frame(np.zeros((4,), dtype=np.float32))


def test_frames_of_observations() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    frame = to_frame(image)
    assert frame.shape == (3, 2, 3)
    assert float(frame[1, 0, 2]) == pytest.approx(7 / 255)
    floats = torch.rand(3, 4, 4)
    assert torch.equal(to_frame(floats), floats)


def test_a_short_past_is_filled_with_stillness() -> None:
    history = History(torch.rand(3, 2, 4, 4), torch.ones(1, 5))
    longer = history.last(4)
    assert torch.equal(longer.frames[:, :3], history.frames[:, :1].expand(-1, 3, -1, -1))
    assert longer.actions.tolist() == [[0.0] * 5, [0.0] * 5, [1.0] * 5]
    assert torch.equal(longer.last(2).frames, history.frames)
    assert torch.equal(longer.last(2).actions, history.actions)
