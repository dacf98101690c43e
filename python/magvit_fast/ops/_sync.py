"""Averages over the processes of torch.distributed, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """All-reduce (sum). Every process's loss sees the sum, so the gradient is summed over them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of a tensor over all processes; x itself when there is only one.

    With losses averaged over the processes, as DistributedDataParallel does to gradients, the gradient
    equals that of one process that holds the whole batch (in equal shares).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    mean: Tensor = _Sum.apply(x) / dist.get_world_size()
    return mean
