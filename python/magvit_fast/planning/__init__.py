"""Planning with a video model: search over actions, costs against a goal, the control loop."""

from __future__ import annotations

from magvit_fast.planning.cem import CrossEntropyMethod, Plan
from magvit_fast.planning.control import Controller, Episode, run_episode, to_frame
from magvit_fast.planning.costs import PixelCost, TokenCost, cost_of
from magvit_fast.planning.recorded import RecordedClip, Replay, replay
from magvit_fast.planning.world import History, MaskViTModel, TokenModel, VideoModel

__all__ = [
    "Controller",
    "CrossEntropyMethod",
    "Episode",
    "History",
    "MaskViTModel",
    "PixelCost",
    "Plan",
    "RecordedClip",
    "Replay",
    "TokenCost",
    "TokenModel",
    "VideoModel",
    "cost_of",
    "replay",
    "run_episode",
    "to_frame",
]
