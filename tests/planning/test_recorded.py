"""Recorded clips as an environment, and what a model makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.planning.block_world import STEP, KnowsTheBlock, moved, render

from magvit_fast.planning import (
    Controller,
    CrossEntropyMethod,
    History,
    PixelCost,
    RecordedClip,
    replay,
    run_episode,
)

PLANNER = CrossEntropyMethod(
    horizon=4, action_dim=2, population=50, elites=8, iterations=3, initial_std=0.1, low=-STEP,
    high=STEP,
)  # fmt: skip


def recording(steps: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """A block that moves by drawn actions: frames [3, steps + 1, h, w], actions [steps, 2]."""
    generator = torch.Generator().manual_seed(0)
    actions = (2 * torch.rand(steps, 2, generator=generator) - 1) * STEP
    places = [torch.tensor([0.5, 0.5])]
    for action in actions:
        places.append(moved(places[-1], action))
    return render(torch.stack(places)).transpose(0, 1).contiguous(), actions


class Still:
    """Predicts that nothing moves."""

    context = 1

    def predict(self, history: History, actions: torch.Tensor) -> torch.Tensor:
        last = history.frames[:, -1:].unsqueeze(0)
        return last.expand(len(actions), -1, actions.shape[1], -1, -1)


def test_a_true_model_predicts_the_recording() -> None:
    frames, actions = recording()
    found = replay(KnowsTheBlock(), frames, actions, PLANNER)
    assert found.windows == 6
    assert found.psnr.shape == found.psnr_copy_last.shape == (4,)
    assert (found.psnr > 45).all()
    assert (found.psnr_copy_last < 30).all()
    assert found.psnr_copy_last[0] > found.psnr_copy_last[-1]  # it moves away
    assert found.rank < 0.02  # recorded actions lead to the recorded end
    assert replay(KnowsTheBlock(), frames, actions, PLANNER, stride=2).windows == 3


def test_a_model_that_ignores_actions_is_found_out() -> None:
    frames, actions = recording()
    found = replay(Still(), frames, actions, PLANNER)
    torch.testing.assert_close(found.psnr, found.psnr_copy_last)
    assert found.rank == 0.5  # all sequences cost the same: as good as chance


def test_episodes_on_a_recording_keep_its_history() -> None:
    frames, actions = recording()
    clip = RecordedClip(frames, actions)
    controller = Controller(KnowsTheBlock(), PixelCost(frames[:, -1]), PLANNER)
    episode = run_episode(clip, controller, steps=100)
    assert torch.equal(episode.frames, frames)
    assert torch.equal(episode.actions, actions)
    assert not torch.equal(episode.planned, actions)
    assert len(episode.plans) == 9
    assert episode.truncated
    assert not episode.terminated
    with pytest.raises(ValueError, match="the clip has ended; call reset"):
        clip.step(None)
    # one step before the end the planner wants what the recording did
    near = run_episode(
        RecordedClip(frames[:, -2:], actions[-1:]),
        Controller(
            KnowsTheBlock(),
            PixelCost(frames[:, -1]),
            dataclasses.replace(PLANNER, horizon=1, iterations=8),
        ),
        steps=1,
    )
    torch.testing.assert_close(near.planned, near.actions, atol=0.02, rtol=0)


def test_bad_recordings() -> None:
    frames, actions = recording(3)
    with pytest.raises(ValueError, match=r"expected at least 5 \(context 1 \+ horizon 4\), got 4"):
        replay(KnowsTheBlock(), frames, actions, PLANNER)
    with pytest.raises(ValueError, match="actions: expected one fewer than the 4 frames, got 2"):
        RecordedClip(frames, actions[1:])
    with pytest.raises(ValueError, match="frames: expected 2 or more, got 1"):
        RecordedClip(frames[:, :1], actions[:0])
