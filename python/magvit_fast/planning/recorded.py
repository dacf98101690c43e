"""Recorded clips in place of a robot: is the model right, and would it have chosen these actions?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magvit_fast.metrics.psnr import frame_psnr
from magvit_fast.ops._checks import check_int
from magvit_fast.planning.cem import CrossEntropyMethod
from magvit_fast.planning.costs import PixelCost, cost_of
from magvit_fast.planning.world import History, VideoModel


class RecordedClip:
    """A recorded clip as an environment: whatever the action, the next recorded frame comes.

    frames: float [C, T, H, W] in [0, 1]; actions: float [T - 1, A], action t was taken at frame t.
    info["executed_action"] is the recorded action, so that run_episode keeps a true history and
    Episode.planned against Episode.actions shows where the planner disagrees.
    """

    def __init__(self, frames: Tensor, actions: Tensor) -> None:
        self.history = History(frames, actions)
        if len(actions) < 1:
            raise ValueError("frames: expected 2 or more, got 1")
        self._time = 0

    def reset(self, *, seed: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The first frame; a recording has no draws."""
        self._time = 0
        return self.history.frames[:, 0], {}

    def step(self, action: Any) -> tuple[Tensor, float, bool, bool, dict[str, Any]]:
        """The next frame, no reward, truncated at the end of the clip."""
        if self._time >= len(self.history.actions):
            raise ValueError("step: the clip has ended; call reset")
        info = {"executed_action": self.history.actions[self._time]}
        self._time += 1
        ended = self._time == len(self.history.actions)
        return self.history.frames[:, self._time], 0.0, False, ended, info


@dataclass(frozen=True)
class Replay:
    """How a model does on a recorded clip, over all windows of context + H frames.

    psnr, psnr_copy_last: [H], dB, of the frames predicted under the recorded actions, and of the
        last given frame repeated; mean over windows.
    rank: fraction of the planner's first draws that cost less than the recorded actions (equal ones
        count half) when the goal is the window's true last frame: 0 = the recorded ones are best,
        0.5 = chance.
    windows: their number.
    """

    psnr: Tensor
    psnr_copy_last: Tensor
    rank: float
    windows: int


@torch.no_grad()
def replay(
    model: VideoModel,
    frames: Tensor,
    actions: Tensor,
    planner: CrossEntropyMethod,
    *,
    stride: int = 1,
    max_batch: int = 64,
) -> Replay:
    """Compare predictions and costs with what a recorded clip shows.

    Args:
        model: predicts frames.
        frames, actions: the clip, as in RecordedClip.
        planner: gives the horizon and the sequences that recorded ones are ranked against.
        stride: frames between windows.
        max_batch: candidates predicted at a time.

    Raises:
        ValueError: a clip shorter than one window.
    """
    check_int("stride", stride, least=1)
    clip, horizon = History(frames, actions), planner.horizon
    length = model.context + horizon
    if frames.shape[1] < length:
        raise ValueError(
            f"frames: expected at least {length} (context {model.context} + horizon {horizon}), "
            f"got {frames.shape[1]}"
        )
    ours, copies, ranks = [], [], []
    generator = torch.Generator().manual_seed(planner.seed)
    for start in range(0, frames.shape[1] - length + 1, stride):
        now, end = start + model.context, start + length
        past = History(clip.frames[:, start:now], clip.actions[start : now - 1])
        recorded = clip.actions[now - 1 : end - 1].unsqueeze(0)
        truth = clip.frames[:, now:end].unsqueeze(0)
        ours.append(frame_psnr(model.predict(past, recorded).to(truth), truth)[0])
        still = past.frames[:, -1:].expand_as(truth[0]).unsqueeze(0)
        copies.append(frame_psnr(still, truth)[0])
        cost = cost_of(PixelCost(truth[0, :, -1], weights="last"), model, past, max_batch=max_batch)
        drawn = planner.draw(planner.start(), generator)
        gaps = cost(drawn) - cost(recorded)
        ranks.append((gaps < 0).float().mean() + 0.5 * (gaps == 0).float().mean())
    return Replay(
        torch.stack(ours).mean(0), torch.stack(copies).mean(0), float(torch.stack(ranks).mean()),
        len(ours),
    )  # fmt: skip
