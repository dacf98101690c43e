"""Sums and moments of all processes, where torch.distributed runs (torchrun, accelerate launch)."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

# How long processes wait for each other. Shares of files take as long as the files are, and torch's
# own 10 or 30 minutes would throw away what the faster processes have; launchers end the others when
# one process fails.
PATIENCE = timedelta(days=14)


def from_all_processes(value: T) -> list[T]:
    """`value` of every process, in the order of their ranks; just [value] in a lone one.

    A collective call: every process of the group has to make it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [item for item in values if item is not None]
