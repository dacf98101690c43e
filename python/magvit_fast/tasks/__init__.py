"""Generation tasks as interior conditions, and COMMIT masking for training."""

from __future__ import annotations

from magvit_fast.tasks.commit import (
    CONDITION_MODES,
    GIVEN,
    PARTS,
    CommitBatch,
    CommitLoss,
    ConditionMode,
    Part,
    commit_loss,
    commit_mask,
    mask_ratio,
)
from magvit_fast.tasks.future_masking import FutureLoss, future_loss, given_frames, mask_future
from magvit_fast.tasks.registry import (
    TASKS,
    ClipGeometry,
    FrameTask,
    RegionTask,
    Task,
    get_task,
)
from magvit_fast.tasks.sampling import task_sequence

__all__ = [
    "CONDITION_MODES",
    "GIVEN",
    "PARTS",
    "TASKS",
    "ClipGeometry",
    "CommitBatch",
    "CommitLoss",
    "ConditionMode",
    "FrameTask",
    "FutureLoss",
    "Part",
    "RegionTask",
    "Task",
    "commit_loss",
    "commit_mask",
    "future_loss",
    "get_task",
    "given_frames",
    "mask_future",
    "mask_ratio",
    "task_sequence",
]
