"""What a forked process finds: no lock that a thread of its parent held at that moment."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from magvit_fast import _recycled, ops
from magvit_fast.ops import _packed_weights

WEIGHT = torch.randn(8, 8, 3, 3, 3)


def _count_packed() -> None:
    assert _packed_weights.held_bytes() == 0


def _take() -> None:
    assert _recycled.held_bytes() == 0
    assert not _recycled.take(torch.empty(_recycled.FROM_BYTES, dtype=torch.uint8))


def _exit_code(work: Callable[[], None]) -> int:
    """That of a forked process that does `work`; negative: it was ended by a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forks with threads
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("module", "work"), [(_packed_weights, _count_packed), (_recycled, _take)])
def test_a_lock_that_is_held(
    module: ModuleType, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recycled, "FROM_BYTES", 1 << 16)
    monkeypatch.setattr(_recycled, "MOST_BYTES", 1 << 20)
    _recycled.forget()
    kept = torch.empty(1 << 16, dtype=torch.uint8)
    _recycled.take(kept)
    for _ in range(2):
        ops.causal_conv3d(torch.randn(1, 8, 2, 4, 4), WEIGHT, impl="native")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with module._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert _exit_code(work) == 0
    finally:
        done.set()
        thread.join()
        _recycled.forget()
    assert _packed_weights.held_bytes() > 0  # the parent's own
