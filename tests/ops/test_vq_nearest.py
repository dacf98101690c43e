"""vq_nearest: the nearest code by its definition, ties, layouts and messages."""

from __future__ import annotations

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal


def _by_definition(z: Tensor, codebook: Tensor) -> Tensor:
    """z [N, D] -> the distances to every code in float64."""
    return (z.double().unsqueeze(1) - codebook.double()).square().sum(-1)


@given(
    positions=st.integers(0, 40),
    codes=st.integers(1, 70),
    dim=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_no_code_is_nearer(positions: int, codes: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(positions, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    distances = _by_definition(z, codebook)
    picked = distances.gather(1, mf.vq_nearest(z, codebook).unsqueeze(1)).squeeze(1)
    best = distances.amin(1) if positions else picked
    assert bool((picked <= best * (1 + 1e-5) + 1e-5).all())


def test_first_of_equal_codes_wins() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    assert mf.vq_nearest(z, codebook).tolist() == [0, 1, 0]


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_nearest(problem: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    z = torch.randn(problem["size"], device=device).to(dtype)
    if problem.get("channels_last"):
        z = z.contiguous(memory_format=torch.channels_last_3d)
    codebook = torch.randn(problem["codes"], problem["size"][1], device=device).to(dtype)
    found = mf.vq_nearest(z, codebook, impl="native")
    flat = z.movedim(1, -1).reshape(-1, z.shape[1])
    assert_equal(found.flatten(), _by_definition(flat, codebook).argmin(1))


@pytest.mark.parametrize("problem", problems("vq_nearest", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_in_float64(problem: dict[str, Any], dtype: torch.dtype, isa_level: str) -> None:
    check_nearest(problem, dtype, "cpu")


def close_codes(device: str) -> tuple[Tensor, Tensor]:
    """Positions and codes whose distances float32 cannot tell apart, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(70, 16, generator=generator) * 1e-3 + 30.0
    codebook[40:50] = codebook[10:20]  # equals: the first wins
    z = codebook[torch.randint(0, 70, (50,), generator=generator)]
    z = z + torch.randn(50, 16, generator=generator) * 2e-4
    return z.to(device), codebook.to(device)


def check_close_codes(device: str) -> None:
    z, codebook = close_codes(device)
    exact = _by_definition(z, codebook).argmin(1)
    assert_equal(mf.vq_nearest(z, codebook, impl="native"), exact)
    assert not bool(((exact >= 40) & (exact < 50)).any())


def test_what_float32_cannot_tell_is_decided_in_float64(isa_level: str) -> None:
    check_close_codes("cpu")


def test_the_close_codes_are_close() -> None:
    """The test above would pass without float64 if these were easy."""
    z, codebook = close_codes("cpu")
    in_float32 = mf.vq_nearest(z, codebook, impl="reference")
    assert not torch.equal(in_float32, _by_definition(z, codebook).argmin(1))


@pytest.mark.parametrize("codes", [1, 31, 32, 33, 100])
def test_equal_codes_give_the_first(codes: int, isa_level: str) -> None:
    z = torch.randn(15, 7)
    assert not bool(mf.vq_nearest(z, torch.randn(1, 7).expand(codes, 7), impl="native").any())


def test_numbers_out_of_range_give_an_index_in_range(isa_level: str) -> None:
    z = torch.randn(20, 5)
    z[3], z[4, 1], z[5, 2] = torch.nan, torch.inf, 3e38
    found = mf.vq_nearest(z, torch.randn(40, 5), impl="native")
    assert int(found.min()) >= 0
    assert int(found.max()) < 40
    assert int(found[3]) == 0


def test_memory_does_not_grow_with_positions_times_codes() -> None:
    z, codebook = torch.randn(4096, 4), torch.randn(4096, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        mf.vq_nearest(z, codebook, impl="native")
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert 4096 * 8 <= taken < 1 << 20  # the scores would take 64 MiB


def test_opcheck() -> None:
    op = torch.ops.magvit_fast.vq_nearest.default
    for z in (torch.randn(2, 5, 3), torch.randn(3, 2, 5).permute(1, 2, 0), torch.empty(0, 5, 3)):
        torch.library.opcheck(op, (z, torch.randn(9, 5), 1))


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1])
def test_any_axis_and_any_strides(channel_dim: int) -> None:
    z = torch.randn(4, 6, 5, 3).transpose(1, 3)
    codebook = torch.randn(z.shape[channel_dim], 9).T
    flat = z.movedim(channel_dim, -1)
    expected = _by_definition(flat.reshape(-1, flat.shape[-1]), codebook).argmin(1)
    assert_equal(
        mf.vq_nearest(z, codebook, channel_dim=channel_dim), expected.view(flat.shape[:-1])
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(50, 4), torch.randn(16, 4)
    whole = mf.vq_nearest(z, codebook, impl="reference")
    door = importlib.import_module("magvit_fast.ops.vq_nearest")
    monkeypatch.setattr(door, "_CHUNK_ELEMENTS", 16 * 7)
    assert_equal(mf.vq_nearest(z, codebook, impl="reference"), whole)


def test_low_precision_is_computed_in_float32() -> None:
    z, codebook = torch.randn(30, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    expected = mf.vq_nearest(z.float(), codebook.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(mf.vq_nearest(z, codebook), expected)


def test_compiles_whole() -> None:
    z, codebook = torch.randn(2, 4, 5, requires_grad=True), torch.randn(16, 4)
    compiled = torch.compile(mf.vq_nearest, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(z, codebook), mf.vq_nearest(z, codebook))


def test_bad_input() -> None:
    z, codebook = torch.randn(2, 4, 5), torch.randn(16, 4)
    with pytest.raises(NotImplementedError, match="float64"):
        mf.vq_nearest(z.double(), codebook, impl="native")
    with pytest.raises(ValueError, match=r"codebook: expected shape \(K >= 1, 4\).*got \(16, 3\)"):
        mf.vq_nearest(z, codebook[:, :3])
    with pytest.raises(ValueError, match=r"got \(0, 4\)"):
        mf.vq_nearest(z, codebook[:0])
    with pytest.raises(TypeError, match=r"codebook: expected a floating-point dtype"):
        mf.vq_nearest(z, codebook.long())
