"""Memory of large results that nobody holds any more, for the next result of the same size.

The C library gives memory of more than 32 MiB back to the system as soon as it is free and gets it
anew for the next result, page by page, each cleared at its first writing: longer than a kernel
takes that runs at the speed of memory, and on virtual machines whose host takes free pages away ten
times as long. So the last few large results are remembered by their storage; one that nobody else
holds any more becomes the next result of its size. One of another size lets go of all that is free,
so that hardly more memory is in use than without (MAGVIT-v2 base, encoding 17x128x128: 397 MiB beyond
the weights; 381 without this, 516 if free memory of other sizes were kept). To its holders a
remembered storage is as any other: it may be resized, shared between processes, and outlive what is
remembered here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

FROM_BYTES = 32 << 20  # smaller memory the C library recycles by itself
MOST_BYTES = 256 << 20  # remembered in all, in use or not

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_lock = threading.Lock()


class _Block:
    """A storage and what is true of it while nobody else holds it."""

    def __init__(self, size: int) -> None:
        self.storage = torch.UntypedStorage(size)
        self._alone = self._state()

    def is_free(self) -> bool:
        return self._state() == self._alone

    def _state(self) -> tuple[int, ...]:
        """Holders in torch and in Python, size, address (sharing between processes moves a storage)."""
        assert _use_count is not None
        holders = _use_count(self.storage._cdata), sys.getrefcount(self.storage)
        return *holders, self.storage.nbytes(), self.storage.data_ptr()


_blocks: list[tuple[int, _Block]] = []  # by size asked for; the last used one last


def held_bytes() -> int:
    """Of all remembered storages, in use or not."""
    return sum(size for size, _ in _blocks)


def forget() -> None:
    """Remember nothing: what is free goes back to the system."""
    with _lock:
        _blocks.clear()


def _after_fork() -> None:
    """In the child, where no thread of the parent runs on to release the lock."""
    global _lock
    _lock = threading.Lock()
    _blocks.clear()


os.register_at_fork(after_in_child=_after_fork)


def take(x: Tensor) -> bool:
    """Give x, dense, freshly allocated and of any contents, memory that is remembered from now on.

    Returns whether it has been written before, by an earlier result. x keeps its own memory where it
    is too small or too large to be worth it, or where this torch does not tell who holds a storage.
    """
    size = x.nbytes
    if _use_count is None or x.device.type != "cpu" or not FROM_BYTES <= size <= MOST_BYTES:
        return False
    with _lock, torch.no_grad():
        for at, (of_size, block) in enumerate(_blocks):
            if of_size == size and block.is_free():
                _blocks.append(_blocks.pop(at))
                x.set_(block.storage, 0, x.shape, x.stride())
                return True
        _blocks[:] = [held for held in _blocks if not held[1].is_free()]
        while held_bytes() + size > MOST_BYTES:
            _blocks.pop(0)
        _blocks.append((size, _Block(size)))
        x.set_(_blocks[-1][1].storage, 0, x.shape, x.stride())
    return False
