"""compat LFQ against the installed vector-quantize-pytorch: same numbers, gradients and state."""

from __future__ import annotations

import itertools

import pytest
import torch

import magvit_fast as mf
from magvit_fast.compat import vector_quantize_pytorch as ours_module
from magvit_fast.compat.vector_quantize_pytorch import LFQ, clamped_excess

peer = pytest.importorskip("vector_quantize_pytorch")

OPTIONS = {
    "plain": {"codebook_size": 1024},
    "projected": {"codebook_size": 4096, "dim": 16},
    "two codebooks": {"codebook_size": 256, "num_codebooks": 2, "dim": 16},
    "two codebooks, own width": {"dim": 8, "num_codebooks": 2},
    "spherical": {"codebook_size": 1024, "spherical": True},
    "rotated": {"codebook_size": 1024, "orthogonal_rotation": True},
    "scaled": {"codebook_size": 512, "codebook_scale": 0.5},
    "magvit2 defaults": {
        "codebook_size": 512,
        "soft_clamp_input_value": 10.0,
        "commitment_loss_weight": 1.0,
        "diversity_gamma": 2.5,
    },
    "cosine": {"codebook_size": 1024, "dim": 32, "cosine_sim_project_in": True},
    "fraction": {"codebook_size": 1024, "frac_per_sample_entropy": 0.5},
    "softplus": {"codebook_size": 1024, "experimental_softplus_entropy_loss": True},
    "not forced": {"codebook_size": 1024, "force_quantization_f32": False},
    "activation": {"codebook_size": 256, "straight_through_activation": torch.nn.Tanh()},
    "channels last": {"codebook_size": 256, "channel_first": False},
}
# decided, in between, and nearly undecided bits: the clamp matters for the last two
TEMPERATURES = [(100.0, 1.0), (1.0, 0.3), (0.1, 0.1)]


def pair(**options):
    torch.manual_seed(0)
    theirs = peer.LFQ(**options)
    torch.manual_seed(0)
    ours = LFQ(**options, peer_faults=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return theirs, ours


def step(module, x, **arguments):
    """Everything that forward gives, and the gradient of a mix of it at x and the parameters."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    result, losses = module(x, return_loss_breakdown=True, **arguments)
    mix = torch.randn(result.quantized.shape)
    target = result.entropy_aux_loss + 0.01 * (result.quantized * mix).sum()
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad(target, leaves, allow_unused=True)
    return result, losses, [g for g in gradients if g is not None]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("inv_temperature", "scale"), TEMPERATURES)
def test_same_numbers(name: str, inv_temperature: float, scale: float) -> None:
    theirs, ours = pair(**OPTIONS[name])
    shapes = [(2, 40, ours.dim)]
    if ours.channel_first is None:
        shapes.append((2, ours.dim, 3, 4, 4))
    for shape, masked in itertools.product(shapes, (False, True)):
        x = torch.randn(shape) * scale
        count = 40 if len(shape) == 3 else 48
        mask = torch.rand(shape[0], count) > 0.3 if masked else None
        arguments = {"inv_temperature": inv_temperature, "mask": mask}
        a, a_losses, a_gradients = step(theirs, x, **arguments)
        b, b_losses, b_gradients = step(ours, x, **arguments)
        assert type(b)._fields == a._fields
        assert torch.equal(b.indices, a.indices)
        assert b.indices.dtype == a.indices.dtype
        torch.testing.assert_close(b.quantized, a.quantized)
        torch.testing.assert_close(b.entropy_aux_loss, a.entropy_aux_loss, atol=2e-5, rtol=1e-5)
        assert type(b_losses)._fields == a_losses._fields
        for mine, other in zip(b_losses, a_losses, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)
        for mine, other in zip(b_gradients, a_gradients, strict=True):
            limit = 2e-3 * float(other.abs().max())  # their softmax loses digits at 2**D codes
            torch.testing.assert_close(mine, other, atol=limit, rtol=0)
        torch.testing.assert_close(
            ours.indices_to_codes(b.indices), theirs.indices_to_codes(a.indices)
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_gives_zero_losses(name: str) -> None:
    theirs, ours = pair(**OPTIONS[name])
    x = torch.randn(2, 7, ours.dim)
    a, b = theirs.eval()(x), ours.eval()(x)
    torch.testing.assert_close(b.quantized, a.quantized)
    assert b.entropy_aux_loss.shape == ()
    assert float(b.entropy_aux_loss) == 0
    torch.testing.assert_close(ours.codebook, theirs.codebook)


def test_the_clamp_in_closed_form() -> None:
    """Against all 2**D codes written out, in float64."""
    torch.manual_seed(0)
    for scale, bits in itertools.product((0.1, 1.0, 3.0, 30.0), (1, 2, 7, 12)):
        logits = torch.randn(20, bits, dtype=torch.float64) * scale
        logits.requires_grad_()
        codes = torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1
        log_p = torch.nn.functional.logsigmoid(logits[:, None] * (2 * codes - 1)).sum(-1)
        written_out = -(log_p.exp() * log_p.clamp(min=torch.tensor(1e-3).log().item())).sum(-1)
        found = -(log_p.exp() * log_p).sum(-1) + clamped_excess(logits, 1e-3)
        torch.testing.assert_close(found, written_out)
        expected, actual = (
            torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (written_out, found)
        )
        torch.testing.assert_close(actual, expected)


def test_without_the_faults_a_mask_keeps_the_mean_over_positions() -> None:
    ours = LFQ(codebook_size=256)
    x = torch.randn(2, 40, 8)
    mask = torch.rand(2, 40) > 0.5
    _, masked = ours(x, return_loss_breakdown=True, mask=mask)
    _, alone = ours(x[mask][None], return_loss_breakdown=True)
    torch.testing.assert_close(masked.per_sample_entropy, alone.per_sample_entropy)
    torch.testing.assert_close(masked.batch_entropy, alone.batch_entropy)


def test_patch_takes_their_module() -> None:
    theirs, _ = pair(codebook_size=1024, dim=16)
    model = torch.nn.Sequential(theirs)
    x = torch.randn(2, 16, 3, 4, 4)
    plain = step(theirs, x)
    report = mf.patch(model, verify=True)
    assert report.count("lfq") == 1
    patched = step(theirs, x)
    assert isinstance(theirs, peer.LFQ)
    assert type(patched[0]) is type(plain[0])
    assert torch.equal(patched[0].indices, plain[0].indices)
    torch.testing.assert_close(patched[1].batch_entropy, plain[1].batch_entropy)
    assert mf.unpatch(model) == 1
    assert type(theirs) is peer.LFQ


@pytest.mark.parametrize("name", OPTIONS)
def test_verification_of_a_quantizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, _ = pair(**OPTIONS[name])
    state = torch.get_rng_state()
    assert mf.patch(theirs, verify=True).count("lfq") == 1
    assert torch.equal(torch.get_rng_state(), state)
    mf.unpatch(theirs)
    monkeypatch.setattr(ours_module, "LOG_CLAMP", 1e-2)
    report = mf.patch(theirs, verify=True)
    assert not report.swapped
    assert "losses differ" in report.left[0].note


def test_trains_like_theirs() -> None:
    theirs, ours = pair(codebook_size=256, dim=16)
    x = torch.randn(4, 16, 2, 4, 4)
    losses = []
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            result = module(x, inv_temperature=1.0)
            loss = result.entropy_aux_loss + (result.quantized - x).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "dim, codebook_size"),
        ({"codebook_size": 1000}, "codebook_size"),
        ({"dim": 8, "num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim"),
        ({"dim": 8, "frac_per_sample_entropy": 0.0}, "frac_per_sample_entropy"),
        ({"dim": 8, "soft_clamp_input_value": 0.5}, "soft_clamp_input_value"),
    ],
)
def test_bad_options_are_named(options, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        LFQ(**options)


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"x: expected 8 features, got 7"):
        LFQ(dim=8)(torch.randn(1, 3, 7))
