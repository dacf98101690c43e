"""vq_nearest: the nearest code by its definition, ties, layouts and messages."""

from __future__ import annotations

import importlib

import hypothesis.strategies as st
import pytest
import torch
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
    whole = mf.vq_nearest(z, codebook)
    door = importlib.import_module("magvit_fast.ops.vq_nearest")
    monkeypatch.setattr(door, "_CHUNK_ELEMENTS", 16 * 7)
    assert_equal(mf.vq_nearest(z, codebook), whole)


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
    with pytest.raises(NotImplementedError, match="no native kernel yet"):
        mf.vq_nearest(z, codebook, impl="native")
    with pytest.raises(ValueError, match=r"codebook: expected shape \(K >= 1, 4\).*got \(16, 3\)"):
        mf.vq_nearest(z, codebook[:, :3])
    with pytest.raises(ValueError, match=r"got \(0, 4\)"):
        mf.vq_nearest(z, codebook[:0])
    with pytest.raises(TypeError, match=r"codebook: expected a floating-point dtype"):
        mf.vq_nearest(z, codebook.long())
