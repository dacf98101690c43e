"""The VQ module: losses by hand, entropies of the release, gradients, initialization."""

from __future__ import annotations

import math

import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.nn.vector_quantize import VectorQuantizer, affinity_entropy, squared_distances


@pytest.mark.parametrize("kind", ["softmax", "argmax"])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_entropies_match_the_release(kind: str, temperature: float) -> None:
    golden = load_goldens("magvit_v1/05b_layers")
    affinity = torch.from_numpy(golden["entropy_affinity"])
    sample, mean = affinity_entropy(affinity, temperature=temperature, kind=kind)  # type: ignore[arg-type]
    key = f"entropy_{kind}_t{temperature}"
    assert sample.item() == pytest.approx(float(golden[f"{key}_sample"]), abs=1e-5)
    assert mean.item() == pytest.approx(float(golden[f"{key}_avg"]), abs=1e-5)
    assert (sample - mean).item() == pytest.approx(float(golden[key]), abs=1e-5)


def test_codebook_starts_within_the_released_bound() -> None:
    limit = float(load_goldens("magvit_v1/05b_layers")["codebook_init_1024x256_limit"])
    codebook = VectorQuantizer(1024, 256).codebook
    assert codebook.abs().max().item() <= math.sqrt(3 / 1024)
    # the measured maximum of a quarter of a million draws is the bound but for 1e-4 of it
    assert codebook.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert codebook.mean().abs().item() < 1e-3


def test_a_hand_worked_example() -> None:
    quantizer = VectorQuantizer(2, 2, entropy_weight=0.5, temperature=1.0, entropy_eps=1e-12)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    z = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]])  # positions (0, .5) and (1, 1)
    out = quantizer(z)
    assert out.ids.tolist() == [[0, 1]]
    assert torch.equal(out.quantized, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
    distance = 0.25 / 4  # one element of four is off by a half
    assert out.losses["commitment"].item() == pytest.approx(0.25 * distance)
    assert out.losses["codebook"].item() == pytest.approx(distance)
    # squared distances: (.25, 1.25) and (2, 0)
    p = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(2.0))]

    def entropy(q: float) -> float:
        return -q * math.log(q) - (1 - q) * math.log(1 - q)

    expected = 0.5 * ((entropy(p[0]) + entropy(p[1])) / 2 - entropy(sum(p) / 2))
    assert out.losses["entropy"].item() == pytest.approx(expected, abs=1e-6)
    total = sum(out.losses[k].item() for k in ("commitment", "codebook", "entropy"))
    assert out.losses["quantizer"].item() == pytest.approx(total, abs=1e-6)


def test_gradients_go_where_they_should() -> None:
    quantizer = VectorQuantizer(8, 3, entropy_weight=0.0)
    z = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    out = quantizer(z)
    weight = torch.randn_like(z)
    (grad,) = torch.autograd.grad((out.quantized * weight).sum(), z, retain_graph=True)
    assert torch.equal(grad, weight)  # straight through
    rows = quantizer.codes(out.ids)
    assert torch.equal(rows, out.quantized)
    (grad,) = torch.autograd.grad(out.losses["commitment"], z, retain_graph=True)
    torch.testing.assert_close(grad, 0.25 * 2 * (z - rows).detach() / z.numel())
    (grad,) = torch.autograd.grad(out.losses["codebook"], quantizer.codebook)
    used = out.ids.unique()
    assert grad[used].abs().min() > 0
    unused = torch.ones(8, dtype=torch.bool)
    unused[used] = False
    assert not grad[unused].any()


def test_the_argmax_entropy_has_the_gradient_of_a_distribution() -> None:
    affinity = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    sample, mean = affinity_entropy(affinity, kind="argmax")
    log_p = affinity.log_softmax(-1)
    assert sample.item() == pytest.approx(-log_p.max(-1).values.mean().item())
    counts = torch.bincount(affinity.argmax(-1), minlength=5) / 6
    assert mean.item() == pytest.approx(-(counts * (counts + 1e-5).log()).sum().item())
    (grad,) = torch.autograd.grad(mean, affinity)
    slope = -(counts.double() + 1e-5).log() - counts / (counts + 1e-5)
    (expected,) = torch.autograd.grad((log_p.exp().mean(0) * slope).sum(), affinity)
    torch.testing.assert_close(grad, expected)


def test_losses_are_those_of_float32_under_autocast() -> None:
    quantizer, z = VectorQuantizer(32, 4), torch.randn(1, 4, 2, 4, 4).bfloat16()
    plain = quantizer(z.float()).losses
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert out.quantized.dtype == torch.bfloat16
    for name, value in out.losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[name])


def test_distances() -> None:
    x, codebook = torch.randn(5, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    torch.testing.assert_close(squared_distances(x, codebook), torch.cdist(x, codebook).square())


def test_bad_input() -> None:
    quantizer = VectorQuantizer(8, 3)
    with pytest.raises(ValueError, match="z: expected 3 channels"):
        quantizer(torch.randn(2, 4, 2))
    with pytest.raises(TypeError, match="ids: expected an int64"):
        quantizer.codes(torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ids: expected 0\.\.7"):
        quantizer.codes(torch.tensor([[8]]))
    for change, message in (
        ({"num_codes": 1}, "num_codes"),
        ({"dim": 0}, "dim"),
        ({"temperature": 0.0}, "temperature"),
        ({"entropy_kind": "x"}, "entropy_kind"),
        ({"entropy_eps": 0.0}, "entropy_eps"),
    ):
        with pytest.raises(ValueError, match=message):
            VectorQuantizer(**change)  # type: ignore[arg-type]
