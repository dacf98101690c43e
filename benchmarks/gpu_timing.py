"""Timing on a GPU: medians of CUDA-graph replays (or events), inputs rotated so that L2 holds none of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

COLD_FACTOR = 3  # a rotation touches this many times the size of L2 before it comes back
MOST_SETS = 64


@dataclasses.dataclass
class Timing:
    ms: float  # median of one call
    low_ms: float
    high_ms: float
    calls: int
    method: str  # "graph" or "events"


def bytes_of(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, (tuple, list)):
        return sum(bytes_of(v) for v in values)
    return 0


def cold_bytes(rotate: bool) -> int:
    """The size of this device's L2 cache, 0 where inputs need not be cold."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size) if rotate else 0


def rotation(make: Callable[[], tuple[Any, ...]], l2_bytes: int) -> list[tuple[Any, ...]]:
    """Enough sets of inputs that each is cold when its turn comes."""
    first = make()
    count = -(-COLD_FACTOR * l2_bytes // max(bytes_of(first), 1))
    return [first, *(make() for _ in range(min(count, MOST_SETS) - 1))]


def _capture(run_all: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    return graph


def measure(
    call: Callable[..., Any], sets: list[tuple[Any, ...]], *, seconds: float, graph: bool = True
) -> Timing:
    """Median time of call(*inputs) over rotated inputs, for about `seconds`."""

    def run_all() -> None:
        for inputs in sets:
            call(*inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: autotuning, lazy loading and the allocator's growth
        for _ in range(2):
            run_all()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    method, step = "events", run_all
    if graph:
        try:
            captured = _capture(run_all)
            method, step = "graph", captured.replay
        except RuntimeError:  # something synchronizes: time it as it is
            torch.cuda.synchronize()
    times: list[float] = []
    until = time.perf_counter() + seconds
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 200):
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    times.sort()
    at = lambda q: times[min(len(times) - 1, int(q * len(times)))]  # noqa: E731
    return Timing(statistics.median(times), at(0.1), at(0.9), len(times) * len(sets), method)
