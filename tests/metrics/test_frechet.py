"""Frechet distance against TF-GAN's numbers, scipy's matrix root and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.goldens import load_goldens
from torch import Tensor

from magvit_fast.metrics import FeatureMoments, frechet_distance, spread


def _golden(name: str) -> Tensor:
    return torch.from_numpy(load_goldens("magvit_v1/09_metrics")[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "first", "second", "count", "tolerance"),
    [
        ("frechet", "feat1", "feat2", 300, 1e-12),
        ("frechet_rank_deficient", "feat_small1", "feat_small2", 16, 1e-9),
        ("frechet_unequal_counts", "feat1", "feat2", 100, 1e-12),
    ],
)
def test_equals_tfgan(
    name: str, first: str, second: str, count: int, tolerance: float, dtype: torch.dtype
) -> None:
    got = frechet_distance(_golden(first)[:count].to(dtype), _golden(second).to(dtype))
    assert got == pytest.approx(float(_golden(f"{name}_float64")), rel=tolerance)
    assert got == pytest.approx(float(_golden(f"{name}_float32")), rel=1e-6)


def test_self_distance_is_rounding() -> None:
    assert frechet_distance(_golden("feat1"), _golden("feat1")) == pytest.approx(0.0, abs=1e-11)


def test_repeats_are_contiguous_with_population_deviation() -> None:
    first, second = _golden("feat1").view(4, 75, 24), _golden("feat2").view(4, 75, 24)
    values = [frechet_distance(a, b) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(
        torch.tensor(values, dtype=torch.float32), _golden("frechet_4repeats"), rtol=1e-6, atol=0
    )
    stated = torch.tensor(spread(values), dtype=torch.float32)
    torch.testing.assert_close(stated, _golden("frechet_4repeats_mean_std"), rtol=1e-5, atol=0)


def test_equals_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(80, 12)), rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)) + 0.3
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root.real
    )
    got = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert got == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_diagonal_covariances() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for independent coordinates."""
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)], dtype=torch.float64)
    unit = signs * (3 / 4) ** 0.5  # covariance exactly the identity, over n - 1 = 3
    first = unit * torch.tensor([2.0, 3.0])
    second = unit * torch.tensor([5.0, 1.0]) + torch.tensor([1.0, -2.0])
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 9 + 4, rel=1e-12)


def test_a_shift_alone() -> None:
    features = torch.randn(50, 7, dtype=torch.float64)
    assert frechet_distance(features, features + 2.0) == pytest.approx(4.0 * 7, rel=1e-10)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 1000))
def test_moments_do_not_depend_on_the_batches(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(sum(sizes) + 2, 5, generator=generator, dtype=torch.float64) + 1e3
    moments = FeatureMoments()
    for batch in whole.split([*sizes, 2]):
        moments.update(batch)
    assert moments.count == len(whole)
    assert moments.mean is not None
    torch.testing.assert_close(moments.mean, whole.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance(), whole.T.cov(), rtol=1e-9, atol=1e-9)


def test_merged_parts_equal_the_whole() -> None:
    first, second = _golden("feat1"), _golden("feat2")
    parts = [FeatureMoments.of(first[:13]), FeatureMoments(), FeatureMoments.of(first[13:])]
    whole = FeatureMoments()
    for part in parts:
        whole.merge(part)
    expected = frechet_distance(first, second)
    assert frechet_distance(whole, second) == pytest.approx(expected, rel=1e-12)
    assert parts[0].count == 13  # the parts are left as they were


def test_bad_input() -> None:
    good = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"features: expected \[N, D\], got \(5,\)"):
        frechet_distance(good[:, 0], good)
    with pytest.raises(ValueError, match="at least 2 samples for a covariance, got 1"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match=r"second: expected D = 3 as in first, got 2"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(good, good * float("nan"))
    with pytest.raises(TypeError, match="real dtype"):
        frechet_distance(good, good.to(torch.complex64))
    moments = FeatureMoments.of(good)
    with pytest.raises(ValueError, match=r"expected D = 3 as before, got 4"):
        moments.update(torch.randn(2, 4))
    with pytest.raises(ValueError, match="at least one"):
        spread([])
