"""Lookup-free quantization beyond its golden arrays."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magvit_fast.nn.quantize import LFQ


def test_check_vectors_of_the_18_bit_code() -> None:
    lfq = LFQ(18, num_token_groups=2)
    z = torch.ones(1, 18, 1, 1, 1)
    assert lfq(z, with_losses=False).ids.item() == 262143 == lfq.num_codes - 1
    z[:, 9:] = -1
    ids = lfq(z, with_losses=False).ids
    assert ids.item() == 511
    assert lfq.split_ids(ids).flatten().tolist() == [511, 0]


def test_zero_is_minus_one() -> None:
    z = torch.tensor([0.0, -0.0, 1.0, -1.0]).view(1, 4, 1, 1, 1)
    out = LFQ(4)(z, with_losses=False)
    assert out.quantized.flatten().tolist() == [-1, -1, 1, -1]
    assert out.ids.item() == 4


@given(
    bits=st.integers(1, 20),
    groups=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_ids_codes_and_sub_tokens_are_inverse_maps(bits: int, groups: int, seed: int) -> None:
    lfq = LFQ(bits, num_token_groups=min(groups, bits))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, lfq.num_codes, (2, 2, 1, 2), generator=generator)
    codes = lfq.codes(ids)
    assert codes.shape == (2, bits, 2, 1, 2)
    assert torch.equal(lfq(codes, with_losses=False).ids, ids)
    assert torch.equal(lfq.merge_ids(lfq.split_ids(ids)), ids)
    assert int(lfq.split_ids(ids).max()) < 2**lfq.group_bits


@pytest.mark.parametrize("bits", [1, 4, 10])
def test_factorized_sample_entropy_is_the_full_softmax_entropy(bits: int) -> None:
    """Section 8 of the facts: the sum of binary entropies equals the entropy over all 2**d codes."""
    torch.manual_seed(0)
    lfq = LFQ(bits)
    z = 0.004 * torch.randn(2, bits, 2, 3, 3, dtype=torch.float64)
    codes = lfq.codes(torch.arange(lfq.num_codes).view(1, -1, 1, 1))[0, :, :, 0, 0].double()
    logits = 2 * z.movedim(1, -1).reshape(-1, bits) @ codes / 0.01
    log_p = logits.log_softmax(-1)
    losses = lfq(z).losses
    p = log_p.exp()
    torch.testing.assert_close(losses["sample_entropy"], -(p * log_p).sum(-1).mean())
    mean = p.mean(0)
    torch.testing.assert_close(losses["codebook_entropy"], -torch.xlogy(mean, mean).sum())


def test_losses_add_up_with_their_weights() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 6, 2, 2, 2)
    lfq = LFQ(6, entropy_weight=0.3, entropy_balance=0.7, commitment_weight=0.5)
    losses = lfq(z).losses
    torch.testing.assert_close(losses["commitment"], 0.5 * (z - z.sign()).square().mean())
    entropy = 0.3 * (losses["sample_entropy"] - 0.7 * losses["codebook_entropy"])
    torch.testing.assert_close(losses["entropy"], entropy)
    torch.testing.assert_close(losses["quantizer"], losses["commitment"] + losses["entropy"])


@pytest.mark.parametrize("kind", ["softmax", "argmax"])
def test_uniform_codes_reach_the_ceiling(kind: str) -> None:
    """All 2**d codes once, decided: sample entropy 0, codebook entropy d ln 2 (less the guard)."""
    lfq = LFQ(8, entropy_eps=1e-5, entropy_kind=kind)  # type: ignore[arg-type]
    z = lfq.codes(torch.arange(256).view(1, 4, 8, 8)).double()
    losses = lfq(z).losses
    assert losses["sample_entropy"].item() == pytest.approx(0, abs=1e-9)
    expected = -math.log(2**-8 + 1e-5)
    assert losses["codebook_entropy"].item() == pytest.approx(expected, abs=1e-9)


def test_argmax_gradient_is_that_of_its_straight_through_definition() -> None:
    torch.manual_seed(0)
    bits, eps = 5, 1e-5
    z = (0.004 * torch.randn(1, bits, 2, 3, 3, dtype=torch.float64)).requires_grad_()
    lfq = LFQ(bits, entropy_eps=eps, entropy_kind="argmax")
    codes = lfq.codes(torch.arange(32).view(1, -1, 1, 1))[0, :, :, 0, 0].double()
    log_p = (2 * z.movedim(1, -1).reshape(-1, bits) @ codes / 0.01).log_softmax(-1)
    p = log_p.exp()
    one_hot = torch.nn.functional.one_hot(p.argmax(-1), 32).double()
    target = one_hot + p - p.detach()
    sample = -(target * log_p).sum(-1).mean()
    mean = target.mean(0)
    codebook = -(mean * (mean + eps).log()).sum()
    losses = lfq(z).losses
    torch.testing.assert_close(losses["sample_entropy"], sample)
    torch.testing.assert_close(losses["codebook_entropy"], codebook)
    for ours, theirs in (
        (losses["sample_entropy"], sample),
        (losses["codebook_entropy"], codebook),
    ):
        mine, plain = (torch.autograd.grad(v, z, retain_graph=True)[0] for v in (ours, theirs))
        torch.testing.assert_close(mine, plain)


def test_straight_through_gradient() -> None:
    z = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    weight = torch.randn(1, 4, 1, 2, 2)
    out = LFQ(4)(z, with_losses=False)
    assert out.quantized.abs().eq(1).all()
    (grad,) = torch.autograd.grad((out.quantized * weight).sum(), z)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_have_float32_losses(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 10, 2, 4, 4).to(dtype)
    low, exact = LFQ(10)(z), LFQ(10)(z.float())
    assert torch.equal(low.ids, exact.ids)
    for name, value in low.losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.losses[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_bits": 0}, "num_bits: expected 1..62"),
        ({"num_bits": 63}, "num_bits: expected 1..62"),
        ({"num_bits": 8, "num_token_groups": 9}, "num_token_groups: expected 1..8"),
        ({"num_bits": 8, "entropy_groups": 3}, "entropy_groups: expected a divisor"),
        ({"num_bits": 8, "temperature": 0.0}, "temperature: expected a positive"),
        ({"num_bits": 8, "entropy_kind": "max"}, "entropy_kind: expected"),
        ({"num_bits": 8, "entropy_kind": "argmax"}, "entropy_eps: .* needs a positive"),
    ],
)
def test_bad_options(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LFQ(**kwargs)  # type: ignore[arg-type]


def test_bad_inputs() -> None:
    lfq = LFQ(4)
    with pytest.raises(ValueError, match="z: expected 4 channels on axis 1"):
        lfq(torch.zeros(1, 5, 1, 1, 1))
    with pytest.raises(ValueError, match=r"ids: expected 0..15 \(4 bits\), got values in -1..3"):
        lfq.codes(torch.tensor([[[[-1, 3]]]]))
    with pytest.raises(ValueError, match=r"got values in 0..16"):
        lfq.codes(torch.tensor([[[[0, 16]]]]))
    with pytest.raises(TypeError, match=r"ids: expected an int64 Tensor, got torch.int32"):
        lfq.codes(torch.zeros(1, 1, 1, 1, dtype=torch.int32))
