"""One row of the GPU session: a piece of work, our way and PyTorch's ways of doing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

CHANNELS_LAST = torch.channels_last_3d
SM90A = "ours, sm90a kernels"  # the way that may use them, by name
# Given torch.compile (with its mode), a way of doing the row's work that is compiled by it.
Compiled = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass
class Row:
    name: str
    make: Callable[[], tuple[Any, ...]]  # inputs on the device
    ways: dict[str, Callable[..., Any]]  # PyTorch's ways
    ours: Callable[..., Any] | None = None
    informative: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    compare: bool = True  # the first result of ours against that of the first way
    sm90a: tuple[str, ...] = ()  # kernels for compute capability 9.0 alone that ours may use
    rotate: bool = True  # among several sets of inputs; off where one call moves more than L2 holds
    graph: bool = True  # time replays of a captured graph, if it can be captured
    items: float = 0.0  # clips or frames that one call makes
    item: str = "clips"
    compiled: Compiled | None = None  # None: torch.compile has nothing to gain, or is not asked
    compile_seconds: float = 30.0  # that compiling and measuring it may take
