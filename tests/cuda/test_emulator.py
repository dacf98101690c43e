"""The emulator notices what it is there to notice."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch


def test_a_missing_barrier_shows(emulated_core: ModuleType) -> None:
    rotated = [*range(1, 64), 0]
    assert emulated_core.selftest_rotate(True) == rotated
    assert any(emulated_core.selftest_rotate(False) != rotated for _ in range(5))


def test_a_barrier_that_lanes_never_reach_is_a_deadlock(emulated_core: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="deadlock"):
        emulated_core.selftest_deadlock()


def test_a_copy_arrives_when_it_is_waited_for(emulated_core: ModuleType) -> None:
    assert emulated_core.selftest_copy(True) == 5.0
    assert math.isnan(emulated_core.selftest_copy(False))


def test_bank_conflicts_of_a_matrix_load_are_refused(emulated_core: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="bank conflicts"):
        emulated_core.selftest_conflict()


def test_launch_limits(emulated_core: ModuleType) -> None:
    assert emulated_core.selftest_too_many_threads() != 0


def test_a_box_arrives_when_its_barrier_says_so(emulated_core: ModuleType) -> None:
    assert emulated_core.selftest_read_box(True) == 7
    assert emulated_core.selftest_read_box(False) == 0xFFFF  # what was there before


def test_bytes_that_never_come_are_a_deadlock(emulated_core: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="deadlock"):
        emulated_core.selftest_wait_forever()


def test_the_copy_engine_reads_what_was_fenced(emulated_core: ModuleType) -> None:
    assert emulated_core.selftest_write_box(True) == 0x3F80
    with pytest.raises(RuntimeError, match="without a fence"):
        emulated_core.selftest_write_box(False)


def test_a_product_of_transposed_operands(emulated_core: ModuleType) -> None:
    # 8 rows of 64 channels, swizzled by the copy engine; the descriptor names them twice (stride 0).
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = (rows.view(torch.int16).int() & 0xFFFF).flatten().tolist()
    product = torch.tensor(emulated_core.selftest_product(bits, 0)).view(64, 64)
    torch.testing.assert_close(product, 2 * rows.float().T @ rows.float())
    with pytest.raises(RuntimeError, match="off the period of the swizzle"):
        emulated_core.selftest_product(bits, 128)
