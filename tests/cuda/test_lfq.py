"""The CUDA kernels of lfq_quantize, lfq_codes and lfq_entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("bit_order", ["lsb", "msb"])
def test_quantize_and_back(
    dtype: torch.dtype, channel_dim: int, bit_order: str, device: torch.device
) -> None:
    z = torch.randn(2, 18, 3, 18, device=device).to(dtype)
    z[0, 0, 0, 0] = 0.0
    options: dict[str, Any] = {"channel_dim": channel_dim, "bit_order": bit_order}
    quantized, indices = mf.lfq_quantize(z, impl="native", **options)
    expected, expected_indices = mf.lfq_quantize(z, impl="reference", **options)
    assert_equal(quantized, expected)
    assert_equal(indices, expected_indices)
    codes = mf.lfq_codes(indices, 18, dtype=dtype, impl="native", **options)
    assert_equal(codes, expected)


def test_codes_of_a_bad_index_are_nan(device: torch.device) -> None:
    indices = torch.tensor([3, 8, 1, -1], device=device)
    if device.type == "cuda":  # the message would need to wait for the device
        codes = mf.lfq_codes(indices, 3, channel_dim=-1, impl="native")
        assert_equal(codes.isnan().all(-1), torch.tensor([False, True, False, True]))
        return
    with pytest.raises(ValueError, match=r"8"):
        mf.lfq_codes(indices, 3, channel_dim=-1, impl="native")


def _entropy(z: Tensor, impl: str, **options: Any) -> tuple[Tensor, ...]:
    leaf = z.detach().requires_grad_()
    per_sample, codebook = mf.lfq_entropy(leaf, impl=impl, **options)
    (of_sample,) = torch.autograd.grad(per_sample, leaf, retain_graph=True)
    (of_codebook,) = torch.autograd.grad(codebook, leaf)
    return per_sample, codebook, of_sample, of_codebook


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "positions", "options"),
    [
        (1, 5, {}),
        (4, 9, {"channel_dim": 1}),
        (6, 7, {"eps": 1e-3}),
        (9, 300, {}),
        (13, 40, {"eps": 1e-5, "log_guard": "clamp"}),
        (15, 130, {}),
        (17, 37, {"eps": 1e-6}),
    ],
)
def test_entropy(
    bits: int, positions: int, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and bits > 13 and dtype != torch.float32:
        pytest.skip("emulated, many bits in float32 alone: other types differ in their loads")
    z = (torch.randn(2, bits, positions) * 0.02).to(device, dtype)
    actual = _entropy(z, "native", **options)
    plain = _entropy(z, "reference", **options)
    exact = _entropy(z.double(), "reference", **options)
    names = ("per_sample", "codebook", "gradient of per_sample", "gradient of codebook")
    for name, a, p, e in zip(names, actual, plain, exact, strict=True):
        assert_within_budget(a, p.to(a.dtype), e, name=name)
    for first, second in zip(actual, _entropy(z, "native", **options), strict=True):
        assert_equal(first, second, name="the second run")


def test_entropy_counts_only_masked_positions(device: torch.device) -> None:
    z = (torch.randn(3, 7, 20) * 0.02).to(device)
    mask = torch.rand(3, 20, device=device) < 0.5
    actual = _entropy(z, "native", mask=mask)
    plain = _entropy(z, "reference", mask=mask)
    exact = _entropy(z.double(), "reference", mask=mask)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_within_budget(a, p, e)
    assert not bool(actual[3].movedim(1, -1)[~mask].any())


def test_entropy_of_decided_bits(device: torch.device) -> None:
    z = torch.tensor([[5.0, -5.0, torch.inf], [-5.0, 5.0, -torch.inf]], device=device)
    per_sample, codebook = mf.lfq_entropy(z, channel_dim=-1, impl="native")
    assert per_sample.item() == 0.0
    assert codebook.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_entropy_where_tf32_is_allowed(device: torch.device) -> None:
    # One product of float16 operands, 11 bits like TF32's: errors of 2^-12 a factor, averaged by the sums.
    z = (torch.randn(2, 14, 70) * 0.02).to(device)
    exact = _entropy(z.double(), "reference")
    full = _entropy(z, "native")
    backend: Any = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        fast = _entropy(z, "native")
    finally:
        backend.fp32_precision = before
    assert abs(fast[1].item() - exact[1].item()) < 1e-4 * exact[1].item()
    away = float((fast[3] - exact[3]).norm() / exact[3].norm())
    assert 1e-6 < away < 2e-3  # above: it is not the full product
    assert float((full[3] - exact[3]).norm() / exact[3].norm()) < 1e-6
    assert_equal(fast[0], full[0])  # no product is in it
    assert_equal(fast[2], full[2])


def test_entropy_of_improbable_codes(device: torch.device) -> None:
    # Probabilities down to 1e-20 in one half: beyond what float16 holds unscaled, and below what counts.
    z = (torch.tensor([[0.1, -0.05, 0.02, 0.0], [-0.08, 0.06, -0.01, 0.03]] * 20)).to(device)
    actual = _entropy(z, "native", channel_dim=-1)
    plain = _entropy(z, "reference", channel_dim=-1)
    exact = _entropy(z.double(), "reference", channel_dim=-1)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_within_budget(a, p, e)


def test_entropy_of_nan_is_nan(device: torch.device) -> None:
    z = torch.zeros(9, 8, device=device)
    z[3, 2] = torch.nan
    per_sample, codebook, _, of_codebook = _entropy(z, "native", channel_dim=-1)
    assert bool(per_sample.isnan())
    assert bool(codebook.isnan())
    assert bool(of_codebook.isnan().any())
