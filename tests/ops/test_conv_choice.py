"""Which convolutions `impl="auto"` leaves to PyTorch: the stated ones, and no others."""

from __future__ import annotations

import pytest
import torch

import magvit_fast as mf
from magvit_fast import _native

MULTIPLIES_BF16 = _native.ISA_LEVELS[_native.isa()] == "avx512_bf16"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# dtype, (C_in, C_out, kernel), other arguments, gradients wanted -> whether PyTorch does it
CASES = [
    (F32, (32, 32, 3), {}, True, False),
    (F32, (32, 32, 3), {"groups": 2}, False, False),
    (F32, (24, 24, 3), {"groups": 2}, False, True),
    (F32, (32, 32, 3), {"groups": 2, "dilation": 2}, False, True),
    (F32, (32, 32, 3), {"groups": 2, "stride": 2}, True, True),
    (F32, (128, 128, 2), {"groups": 2, "stride": 2}, True, False),
    (F32, (32, 32, 3), {"groups": 32, "stride": 2}, True, False),
    (F32, (24, 24, 3), {"groups": 12}, False, False),
    (F32, (24, 24, 3), {"groups": 12, "stride": 2}, False, True),
    (F32, (24, 24, 3), {"groups": 12, "stride": 2}, True, False),
    (F32, (32, 32, 1), {}, True, False),
    (F32, (3, 32, 3), {}, False, False),
    (F16, (32, 32, 3), {"groups": 2}, False, False),
    (F16, (32, 32, 1), {}, False, False),
    (BF16, (32, 32, 3), {}, True, False),
    (BF16, (32, 32, 3), {"groups": 2}, False, MULTIPLIES_BF16),
    (BF16, (64, 64, 3), {"groups": 2}, True, False),
    (BF16, (32, 32, 3), {"groups": 32}, True, False),
    (BF16, (32, 32, 3), {"groups": 32}, False, MULTIPLIES_BF16),
    (BF16, (32, 32, 3), {"groups": 8}, False, False),
    (BF16, (32, 32, 1), {}, True, False),
    (BF16, (3, 32, 3), {}, False, False),
    (BF16, (16, 16, 3), {}, True, False),
    (BF16, (16, 32, 4), {"stride": 2}, False, False),
]


@pytest.mark.parametrize(("dtype", "sizes", "how", "gradients", "by_torch"), CASES)
def test_auto(dtype, sizes, how, gradients, by_torch, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    monkeypatch.setattr(_native, "trace", lambda op, **_facts: launches.append(op))
    torch.manual_seed(0)
    inputs, outputs, kernel = sizes
    x = torch.randn(1, inputs, 3, 6, 6).to(dtype)
    shape = (outputs, inputs // how.get("groups", 1), kernel, kernel, kernel)
    weight = (torch.randn(shape) / shape[1] ** 0.5 / kernel**1.5).to(dtype)
    weight.requires_grad_(gradients)
    auto = mf.causal_conv3d(x, weight, **how)
    assert (not launches) == by_torch
    native = mf.causal_conv3d(x, weight, impl="native", **how)
    assert launches  # asked for by name it always runs
    torch.testing.assert_close(auto, native, atol=1e-5 if dtype == F32 else 3e-2, rtol=2e-2)


def test_less_capable_machines_keep_bfloat16_native(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    monkeypatch.setattr(_native, "trace", lambda op, **_facts: launches.append(op))
    x, weight = torch.randn(1, 8, 2, 4, 4).bfloat16(), torch.randn(8, 8, 1, 1, 1).bfloat16()
    with _native.max_isa("avx2"):
        mf.causal_conv3d(x, weight)
    assert launches
