"""The sanitizers really see what kernels do with torch's memory (`make asan`; else left out)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from magvit_fast import _native, ops

CORE: Any = _native._cpu_core
SANITIZED = CORE is not None and "address" in CORE.build_info().get("sanitizers", "")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(not SANITIZED, reason="the core has no address sanitizer")


def _report(work: Callable[[], object], log: Path) -> str:
    """What a child process wrote that did the work; "" if it came to its end.

    One thread: those of OpenMP do not live on in a child.
    """
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    text = log.read_text()
    assert (status == 0) == (text == ""), text
    return text


class _Elsewhere:
    """The core, with other addresses for x, y and weight of group norm."""

    def __init__(self, x: Tensor, y: Tensor, weight: int) -> None:
        self._x, self._y, self._weight = x.data_ptr(), y.data_ptr(), weight

    def __getattr__(self, name: str) -> Any:
        return getattr(CORE, name)

    def group_norm_silu_forward(self, numbers: list[int], eps: float, y: int, *rest: Any) -> None:
        numbers = [self._x, self._weight, *numbers[2:]]
        CORE.group_norm_silu_forward(numbers, eps, self._y, *rest)


def _norm(x: Tensor, y: Tensor, channels: int, weight: int = 0) -> None:
    """Group norm of 1 x channels x 1 x 1 x 2 in a child process; x and y may be too small for that.

    weight: address of float32 [channels].
    """
    there, where = _Elsewhere(x, y, weight), _native.launcher(x.device)[1:]
    _native.launcher = lambda device: (there, *where)
    shape = torch.zeros(1, channels, 1, 1, 2, dtype=x.dtype)
    ops.group_norm_silu(shape.contiguous(memory_format=torch.channels_last_3d), 2, impl="native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [32, 22], ids=["whole_vectors", "a_rest"])
def test_one_element_too_far(
    channels: int, dtype: torch.dtype, isa_level: str, tmp_path: Path
) -> None:
    whole, short = (torch.ones(2 * channels - less, dtype=dtype) for less in (0, 1))
    log = tmp_path / "stderr"
    assert _report(lambda: _norm(whole, whole.clone(), channels), log) == ""
    reading = _report(lambda: _norm(short, whole, channels), log)
    assert "AddressSanitizer" in reading
    assert "READ of size" in reading
    writing = _report(lambda: _norm(whole, short, channels), log)
    assert "AddressSanitizer" in writing
    assert "WRITE of size" in writing


@pytest.mark.parametrize("size", [(1, 8, 3, 8, 8), (1, 8, 3, 3, 3)], ids=["winograd", "direct"])
def test_a_workspace_that_is_too_small(
    size: tuple[int, ...], isa_level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.ones(size), torch.ones(8, 8, 3, 3, 3)
    enough = _native.workspace

    def run() -> None:
        ops.causal_conv3d(x, weight, impl="native")

    assert _report(run, tmp_path / "stderr") == ""
    monkeypatch.setattr(_native, "workspace", lambda n, device: enough(n // 2, device))
    assert "AddressSanitizer" in _report(run, tmp_path / "stderr")


def test_a_misaligned_address(tmp_path: Path) -> None:
    x, weight = torch.ones(64), torch.ones(33)
    log = tmp_path / "stderr"
    assert _report(lambda: _norm(x, x.clone(), 32, weight.data_ptr() + 4), log) == ""
    assert "misaligned address" in _report(
        lambda: _norm(x, x.clone(), 32, weight.data_ptr() + 1), log
    )


def test_fresh_memory_is_not_a_number() -> None:
    """Kernels that read what nobody has written show it in their results."""
    for dtype in DTYPES:
        assert torch.empty(100_003, dtype=dtype).isnan().all()
