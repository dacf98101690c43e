"""lfq_entropy: both entropies and their gradients against the dense softmax over all codes."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given, settings
from tests.goldens import load_goldens
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARDS = [
    pytest.param({}, id="exact"),
    pytest.param({"eps": 1e-5}, id="shift"),
    pytest.param({"eps": 1e-3, "log_guard": "clamp"}, id="clamp"),
]


def _with_gradients(z: Tensor, **options: Any) -> dict[str, Tensor]:
    leaf = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    per_sample, codebook = mf.lfq_entropy(leaf, **options)
    (of_sample,) = torch.autograd.grad(per_sample, leaf, retain_graph=True)
    (of_codebook,) = torch.autograd.grad(codebook, leaf)
    return {
        "per_sample": per_sample.detach(), "codebook": codebook.detach(),
        "of_sample": of_sample, "of_codebook": of_codebook,
    }  # fmt: skip


def _check_budget(z: Tensor, **options: Any) -> None:
    native = _with_gradients(z, impl="native", **options)
    plain = _with_gradients(z, impl="reference", **options)
    exact = _with_gradients(z.double(), **options)
    for name, value in native.items():
        assert_within_budget(value, plain[name], exact[name], name=name)


def _problem_input(problem: dict[str, Any]) -> Tensor:
    return torch.randn(problem["positions"], problem["bits"]) * problem["deviation"]


# ---- values ----------------------------------------------------------------------------------
def _dense(z: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """The definition: a softmax over the similarity with every code."""
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=z.shape[1])), dtype=z.dtype)
    p = (2 * inv_temperature * z @ codes.T).softmax(1)
    mean = p.mean(0)
    return -torch.special.xlogy(p, p).sum(1).mean(), -torch.special.xlogy(mean, mean).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("inv_temperature", [100.0, 1.0])
def test_reference_is_the_dense_softmax(bits: int, inv_temperature: float) -> None:
    z = torch.randn(30, bits, dtype=torch.float64) * 0.01 * 100 / inv_temperature
    z.requires_grad_()
    actual = mf.lfq_entropy(z, inv_temperature=inv_temperature)
    expected = _dense(z, inv_temperature)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        (da,) = torch.autograd.grad(a, z, retain_graph=True)
        (de,) = torch.autograd.grad(e, z, retain_graph=True)
        torch.testing.assert_close(da, de, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("problem", problems("lfq_entropy", "test"), ids=lambda p: p["name"])
def test_native_keeps_the_budget(problem: dict[str, Any], isa_level: str) -> None:
    _check_budget(_problem_input(problem))


@pytest.mark.parametrize("options", GUARDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deviation", [0.004, 0.2])
def test_guards_and_dtypes(options: dict[str, Any], dtype: torch.dtype, deviation: float) -> None:
    z = (torch.randn(2, 11, 3, 5, 6) * deviation).to(dtype)
    _check_budget(z, **options)


@pytest.mark.parametrize(
    "case", ["d10_normal", "d10_small", "d18_normal", "d18_small", "d16_small"]
)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_goldens_of_the_port(case: str, impl: str) -> None:
    arrays = load_goldens("magvit_v2/lfq")
    z = torch.from_numpy(arrays[f"{case}/z"])  # [B, T, H, W, D]
    options: dict[str, Any] = {"channel_dim": -1, "impl": impl}
    sample, codebook = mf.lfq_entropy(z, eps=1e-5, **options)
    assert float(sample) == pytest.approx(float(arrays[f"{case}/sample_entropy.f64"]), abs=1e-5)
    assert float(codebook) == pytest.approx(float(arrays[f"{case}/batch_entropy.f64"]), abs=1e-5)
    sample, codebook = mf.lfq_entropy(z, **options)
    exact = float(arrays[f"{case}/unguarded_batch_entropy_f64"])
    assert float(codebook) == pytest.approx(exact, abs=1e-5)


def test_uniform_codes_reach_the_ceiling() -> None:
    """All 2**18 codes alike: exactly 18 ln 2, which the guarded logarithms of others cannot reach."""
    z = torch.zeros(3, 18)
    sample, codebook = mf.lfq_entropy(z)
    assert float(sample) == pytest.approx(18 * math.log(2), rel=1e-6)
    assert float(codebook) == pytest.approx(18 * math.log(2), rel=1e-6)
    guarded = mf.lfq_entropy(z, eps=1e-5)[1]
    assert float(guarded) == pytest.approx(-math.log(2.0**-18 + 1e-5), rel=1e-6)


def test_24_bits() -> None:
    z = torch.zeros(2, 24)
    z[:, 20:] = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    sample, codebook = mf.lfq_entropy(z, impl="native")
    assert float(sample) == pytest.approx(20 * math.log(2), rel=1e-6)
    assert float(codebook) == pytest.approx(21 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("inv_temperature", [1e-4, 1.0, 100.0, 1e8])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e4, 3e38])
def test_extremes_stay_finite(impl: str, inv_temperature: float, magnitude: float) -> None:
    z = magnitude * torch.tensor([[1.0, -1.0, 1.0, 0.0, 1.0, -1.0, 1.0], [1.0] * 7])
    result = _with_gradients(z, inv_temperature=inv_temperature, impl=impl)
    for name, value in result.items():
        assert bool(value.isfinite().all()), name
    assert 0.0 <= float(result["per_sample"]) <= 7 * math.log(2) * 1.000001


def test_nan_is_not_hidden() -> None:
    z = torch.randn(40, 9)
    z[7, 3] = torch.nan
    for impl in ("native", "reference"):
        sample, codebook = mf.lfq_entropy(z, impl=impl)
        assert bool(sample.isnan())
        assert bool(codebook.isnan())
        mask = torch.arange(40) != 7
        assert all(bool(e.isfinite()) for e in mf.lfq_entropy(z, mask=mask, impl=impl))


# ---- gradients -------------------------------------------------------------------------------
@pytest.mark.parametrize("options", GUARDS)
def test_gradcheck_of_the_reference(options: dict[str, Any]) -> None:
    z = (torch.randn(4, 5, dtype=torch.float64) * 0.3).requires_grad_()
    mask = torch.tensor([True, True, False, True])
    for m in (None, mask):
        assert torch.autograd.gradcheck(
            lambda x, m=m: mf.lfq_entropy(x, inv_temperature=1.0, mask=m, **options), (z,)
        )


def test_second_derivative_is_refused() -> None:
    z = torch.randn(4, 5, requires_grad=True)
    _, codebook = mf.lfq_entropy(z, inv_temperature=1.0, impl="native")
    (grad,) = torch.autograd.grad(codebook, z, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    upstream = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(codebook * upstream, z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_same_bits_for_any_number_of_threads() -> None:
    z = torch.cat([torch.randn(70, 12) * 0.004, torch.randn(70, 12)])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_with_gradients(z, impl="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in other.items():
            assert_equal(value, results[0][name], name=name)


# ---- arguments -------------------------------------------------------------------------------
@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1])
def test_any_axis_any_strides_and_masks(channel_dim: int) -> None:
    whole = torch.randn(6, 10, 8, 7) * 0.05
    for z in (whole, whole.permute(2, 0, 3, 1), whole[::2, 1::3], whole[:, :1].expand(6, 4, 8, 7)):
        shape = z.movedim(channel_dim, -1).shape[:-1]
        for mask in (None, torch.rand(shape) < 0.5):
            _check_budget(z, channel_dim=channel_dim, mask=mask)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_mask_is_selection(impl: str) -> None:
    z = torch.randn(50, 7) * 0.02
    mask = torch.rand(50) < 0.4
    masked = _with_gradients(z, mask=mask, impl=impl)
    selected = _with_gradients(z[mask], impl=impl)
    for name in ("per_sample", "codebook"):
        torch.testing.assert_close(masked[name], selected[name])
    for name in ("of_sample", "of_codebook"):
        torch.testing.assert_close(masked[name][mask], selected[name], rtol=1e-4, atol=1e-5)
        assert_equal(masked[name][~mask], torch.zeros_like(z[~mask]))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_nothing_to_count_is_zero(impl: str) -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    for z, mask in ((torch.randn(0, 6), None), (torch.randn(3, 6), nothing)):
        result = _with_gradients(z, mask=mask, impl=impl)
        assert float(result["per_sample"]) == float(result["codebook"]) == 0.0
        assert_equal(result["of_codebook"], torch.zeros_like(z))


@settings(max_examples=12)
@given(
    bits=st.integers(2, 11), positions=st.integers(1, 50), seed=st.integers(0, 99),
    deviation=st.sampled_from([0.003, 0.05, 1.0]),
)  # fmt: skip
def test_order_of_channels_and_positions_does_not_matter(
    bits: int, positions: int, seed: int, deviation: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(positions, bits, generator=generator) * deviation
    rows = torch.randperm(positions, generator=generator)
    columns = torch.randperm(bits, generator=generator)
    flips = torch.randint(0, 2, (bits,), generator=generator) * 2.0 - 1.0
    sample, codebook = mf.lfq_entropy(z, impl="native")
    for other in (z[rows], z[:, columns], z * flips):
        s, c = mf.lfq_entropy(other, impl="native")
        torch.testing.assert_close(s, sample, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c, codebook, rtol=1e-5, atol=1e-5)
    # Concavity: the mean distribution is at least as spread as the positions are, at most uniform.
    assert float(sample) - 1e-4 <= float(codebook) <= bits * math.log(2) + 1e-4


def test_memory_of_18_bits_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward together, for 1280 positions: below 20 MB."""
    monkeypatch.setattr(_native, "_kept", threading.local())  # no workspace is there already
    z = torch.randn(1280, 18, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        sample, codebook = mf.lfq_entropy(z, impl="native")
        (sample - codebook).backward()
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert 4 << 18 <= taken < 20e6  # the mean distribution; 1280 such rows would take 1.3 GB


# ---- torch's machinery -----------------------------------------------------------------------
def test_opcheck() -> None:
    ops = torch.ops.magvit_fast
    last = torch.randn(2, 5, 3, 2, 4).contiguous(memory_format=torch.channels_last_3d)
    inputs = (
        (torch.randn(4, 3, 5).permute(0, 2, 1), None),
        (torch.randn(4, 3, 5).permute(0, 2, 1), torch.rand(4, 3) < 0.5),
        (torch.randn(2, 5, 3, 4).transpose(2, 3), None),  # positions are no one stride apart
        (last[:, :, 1:], None),  # not dense
    )
    for z, m in inputs:
        torch.library.opcheck(ops.lfq_entropy_sums.default, (z, m, 1, 4.0))
        probs, stats = ops.lfq_entropy_sums(z, m, 1, 4.0)
        torch.library.opcheck(ops.lfq_entropy_codebook.default, (probs, stats, 0.0, False))
        one = torch.ones(())
        torch.library.opcheck(
            ops.lfq_entropy_backward.default, (z, m, 1, 4.0, probs, stats, one, one, 1e-5, True)
        )


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compiles_whole(impl: str) -> None:
    def f(z: Tensor, mask: Tensor) -> Tensor:
        sample, codebook = mf.lfq_entropy(z * 0.1, mask=mask, impl=impl)
        return sample - 2 * codebook

    z, mask = torch.randn(2, 6, 7), torch.rand(2, 7) < 0.7
    expected, actual = z.clone().requires_grad_(), z.clone().requires_grad_()
    f(expected, mask).backward()
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(actual, mask)
    loss.backward()
    torch.testing.assert_close(loss, f(z, mask))
    torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_autocast_and_inference_mode_change_nothing(impl: str) -> None:
    z = torch.randn(40, 8) * 0.02
    expected = mf.lfq_entropy(z, impl=impl)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        actual = mf.lfq_entropy(z, impl=impl)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


def test_bad_input() -> None:
    z = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"z: expected 1 to 24 channels at dim 1, got 25"):
        mf.lfq_entropy(torch.randn(3, 25))
    with pytest.raises(TypeError, match=r"z: expected a floating-point dtype"):
        mf.lfq_entropy(z.long())
    with pytest.raises(ValueError, match=r"inv_temperature: expected a positive number, got -1"):
        mf.lfq_entropy(z, inv_temperature=-1.0)
    with pytest.raises(ValueError, match=r"eps: expected 0 <= eps < 1, got -0.1"):
        mf.lfq_entropy(z, eps=-0.1)
    with pytest.raises(ValueError, match=r"log_guard: expected one of 'shift', 'clamp', got 'add'"):
        mf.lfq_entropy(z, eps=0.1, log_guard="add")
    with pytest.raises(TypeError, match=r"mask: expected dtype torch.bool, got torch.float32"):
        mf.lfq_entropy(z, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"mask: expected shape \(3,\).*got \(5,\)"):
        mf.lfq_entropy(z, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="float64"):
        mf.lfq_entropy(z.double(), impl="native")
