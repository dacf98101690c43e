"""Generation tasks as interior conditions, and COMMIT masking for training."""

from __future__ import annotations

from magvit_fast.tasks.commit import (
    PARTS,
    CommitBatch,
    CommitLoss,
    commit_loss,
    commit_mask,
    mask_ratio,
)
from magvit_fast.tasks.registry import (
    TASKS,
    ClipGeometry,
    FrameTask,
    RegionTask,
    Task,
    get_task,
)

__all__ = [
    "PARTS",
    "TASKS",
    "ClipGeometry",
    "CommitBatch",
    "CommitLoss",
    "FrameTask",
    "RegionTask",
    "Task",
    "commit_loss",
    "commit_mask",
    "get_task",
    "mask_ratio",
]
