"""Sums and averages over the processes of torch.distributed, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduced(x: Tensor) -> Tensor:
    """Sum over processes, without gradient."""
    total = x.contiguous().clone()
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    """All-reduce (sum). Every process's loss sees the sum, so the gradient is summed over them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduced(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduced(grads[0])


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes; x itself when there is only one. See mean_over_processes."""
    if not is_distributed():
        return x
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of a tensor over all processes; x itself when there is only one.

    With losses averaged over the processes, as DistributedDataParallel does to gradients, the gradient
    equals that of one process that holds the whole batch (in equal shares).
    """
    if not is_distributed():
        return x
    return sum_over_processes(x) / dist.get_world_size()
