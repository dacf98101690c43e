"""Sums and moments of all processes, where torch.distributed runs (torchrun, accelerate launch)."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_all_processes(value: T) -> list[T]:
    """`value` of every process, in the order of their ranks; just [value] in a lone one.

    A collective call: every process of the group has to make it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [item for item in values if item is not None]
