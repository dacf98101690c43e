"""The order of training: which draws make up batch number n. A pure function: resuming is exact.

Batch n is the same whatever the number of processes and loader workers, and whatever ran before it:
a run that stopped after n batches goes on by asking for batch n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Draw:
    """A request to a data set: entry `index` of its clips (or stills), augmented as in `epoch`."""

    epoch: int
    index: int
    still: bool = False


@dataclass(frozen=True)
class BatchOrder:
    """Endless shuffled batches; every epoch is a new permutation of all entries.

    num_clips, num_stills: entries of the data set's two pools (clips of many frames; images).
    batch_size: draws in a batch over all processes together; has to be a multiple of num_processes.
    still_ratio: share of batches made of stills (a batch has one shape, so it is all or none),
        spread evenly: 0.25 makes every fourth batch one of stills.
    """

    num_clips: int
    batch_size: int
    seed: int = 0
    num_stills: int = 0
    still_ratio: float = 0.0
    rank: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.num_processes:
            raise ValueError(
                "batch_size: expected a positive multiple of the number of processes "
                f"({self.num_processes}), got {self.batch_size}"
            )
        if not 0.0 <= self.still_ratio <= 1.0:
            raise ValueError(f"still_ratio: expected a share in [0, 1], got {self.still_ratio}")
        if self.num_clips < 1 and self.still_ratio < 1.0:
            raise ValueError("num_clips: expected at least 1, got an empty data set")
        if self.num_stills < 1 and self.still_ratio > 0.0:
            raise ValueError("num_stills: expected at least 1 for a still_ratio above 0, got 0")

    def batch(self, number: int) -> list[Draw]:
        """This process's share of batch `number`."""
        stills_before = math.floor(number * self.still_ratio)
        still = math.floor((number + 1) * self.still_ratio) > stills_before
        size = self.num_stills if still else self.num_clips
        done = (stills_before if still else number - stills_before) * self.batch_size
        share = self.batch_size // self.num_processes
        first = done + self.rank * share
        positions = [divmod(position, size) for position in range(first, first + share)]
        return [
            Draw(epoch, int(_permutation(size, self.seed, epoch, still)[place]), still)
            for epoch, place in positions
        ]

    def batches(self, start: int, stop: int) -> Iterator[list[Draw]]:
        """Batches start, start + 1, ... stop - 1: the batch sampler of a torch DataLoader."""
        return (self.batch(number) for number in range(start, stop))


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int, still: bool) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, int(still)]).permutation(size)
