from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.goldens import load_goldens

from magvit_fast.training.losses import (
    LeCam,
    TokenizerLossWeights,
    discriminator_loss,
    entropy_weight,
    generator_adversarial_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
)

GOLDEN = "magvit_v2/gan_losses"


def golden_lecam(
    golden: dict[str, np.ndarray], step: int, dtype: torch.dtype = torch.float32
) -> LeCam:
    settings = json.loads(str(golden["settings_json"]))
    lecam = LeCam(decay=settings["polyak_decay"]).to(dtype)
    lecam.ema_real.fill_(float(golden[f"step{step}/ema_real_before"]))
    lecam.ema_fake.fill_(float(golden[f"step{step}/ema_fake_before"]))
    return lecam


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_losses(step: int, dtype: torch.dtype) -> None:
    golden = load_goldens(GOLDEN)
    exact = dtype == torch.float64

    def get(name: str) -> torch.Tensor:
        key = f"step{step}/{name}"
        wide = f"{key}.f64"
        return torch.from_numpy(golden[wide if exact and wide in golden else key]).to(dtype)

    def close(actual: torch.Tensor, name: str, tolerance: float = 1e-6) -> None:
        # the inputs are stored in float32, so .f64 values are reproduced to float32 input rounding
        torch.testing.assert_close(actual.detach(), get(name), atol=tolerance, rtol=0, msg=name)

    real, fake = (get(f"logits_{k}").clone().requires_grad_() for k in ("real", "fake"))
    video = torch.from_numpy(golden["video"]).to(dtype)
    reconstructed = torch.from_numpy(golden["reconstructed"]).to(dtype)
    lecam = golden_lecam(golden, step, dtype)

    d_total, d_parts = discriminator_loss(real, fake, lecam=lecam)
    close(d_parts["adversarial"], "d_adversarial_loss")
    close(d_parts["lecam"], "lecam_loss")
    close(d_total + get("in_grad_penalty"), "d_loss", 2e-6)
    d_real, d_fake = torch.autograd.grad(d_total, (real, fake))
    close(d_real, "d_d_loss_d_logits_real")
    close(d_fake, "d_d_loss_d_logits_fake")
    for name in ("real", "fake"):
        close(getattr(lecam, f"ema_{name}"), f"ema_{name}_after")
    close(lecam.ema_real, "eval_ema_real_after")

    g_total, g_parts = generator_loss(
        video, reconstructed, quantizer=get("in_quantizer_loss"), logits_fake=fake
    )
    close(g_parts["reconstruction"], "reconstruction_loss")
    close(g_parts["adversarial"], "g_adversarial_loss")
    close(g_parts["quantizer"], "quantizer_loss")
    close(g_total, "g_loss")
    close(torch.autograd.grad(g_total, fake)[0], "d_g_loss_d_logits_fake")
    without, _ = generator_loss(video, reconstructed, logits_fake=fake)
    close(without, "eval_g_loss")
    for name in ("real", "fake"):
        before = golden_lecam(golden, step, dtype).get_buffer(f"ema_{name}")
        torch.testing.assert_close(before, get(f"ema_{name}_before"), atol=1e-7, rtol=0)
    # What the port hands through: it has no perceptual network, and no quantizer loss in evaluation.
    assert get("perceptual_loss") == get("eval_quantizer_loss") == 0
    close(get("in_grad_penalty"), "grad_penalty")


def test_golden_reconstruction_gradient_and_settings() -> None:
    golden = load_goldens(GOLDEN)
    video = torch.from_numpy(golden["video"])
    reconstructed = torch.from_numpy(golden["reconstructed"]).requires_grad_()
    weights = TokenizerLossWeights()
    (weights.reconstruction * reconstruction_loss(reconstructed, video)).backward()
    expected = torch.from_numpy(golden["d_recon_loss_d_reconstructed"])
    torch.testing.assert_close(reconstructed.grad, expected, atol=1e-6, rtol=0)
    assert json.loads(str(golden["settings_json"])) == {
        "g_adversarial_loss_weight": weights.adversarial,
        "reconstruction_loss_weight": weights.reconstruction,
        "polyak_decay": weights.lecam_decay,
        "lecam_weight": weights.lecam,
    }


def test_averages_chain_over_steps() -> None:
    golden = load_goldens(GOLDEN)
    for start in (0, 2):
        lecam = golden_lecam(golden, start)
        for step in (start, start + 1):
            real, fake = (
                torch.from_numpy(golden[f"step{step}/logits_{k}"]) for k in ("real", "fake")
            )
            lecam(real, fake)
        assert lecam.ema_real.item() == pytest.approx(
            float(golden[f"step{start + 1}/ema_real_after"]), abs=1e-6
        )


def test_first_reading_of_lecam_matches_the_official_code() -> None:
    golden = load_goldens("magvit_v1/06b_losses")
    cases = golden["lecam_cases_real_fake_emareal_emafake"]
    for (real, fake, ema_real, ema_fake), expected in zip(
        cases, golden["lecam_values"], strict=True
    ):
        lecam = LeCam(reading="v1")
        lecam.ema_real.fill_(float(ema_real))
        lecam.ema_fake.fill_(float(ema_fake))
        # two logits with that mean: the reading looks at the mean alone
        value = lecam(torch.tensor([real - 1, real + 1]), torch.tensor([fake + 2, fake - 2]))
        assert value.item() == pytest.approx(float(expected), abs=1e-5)
    lecam = LeCam(reading="v1")
    for (real, fake), (loss, ema_real, ema_fake) in zip(
        golden["lecam_traj_preds"], golden["lecam_traj_loss_emareal_emafake"], strict=True
    ):
        value = lecam(torch.tensor([real]), torch.tensor([fake]))
        assert value.item() == pytest.approx(float(loss), abs=1e-5)
        assert lecam.ema_real.item() == pytest.approx(float(ema_real), abs=1e-6)
        assert lecam.ema_fake.item() == pytest.approx(float(ema_fake), abs=1e-6)
    real, fake = (torch.from_numpy(golden[f"{k}_logits"]) for k in ("real", "fake"))
    for kind in ("non_saturating", "hinge"):
        weights = TokenizerLossWeights(gan=kind, reconstruction=0.0)  # type: ignore[arg-type]
        _, judged = discriminator_loss(real, fake, weights=weights)
        official = float(golden[f"d_loss_{kind.replace('_', '-')}"])
        assert judged["adversarial"].item() == pytest.approx(official, rel=1e-6)
        ours = generator_adversarial_loss(fake, kind)  # type: ignore[arg-type]
        official = float(golden[f"g_loss_{kind.replace('_', '-')}"])
        assert ours.item() == pytest.approx(official, rel=1e-6)
        _, made = generator_loss(real, real, logits_fake=fake, weights=weights)
        assert made["adversarial"].item() == pytest.approx(0.1 * official, rel=1e-6)
    pair = [torch.from_numpy(golden[f"l_{k}"]) for k in "ab"]
    for distance in ("l1", "l2"):
        weights = TokenizerLossWeights(distance=distance)  # type: ignore[arg-type]
        _, made = generator_loss(*pair, weights=weights)
        official = 5.0 * float(golden[distance])
        assert made["reconstruction"].item() == pytest.approx(official, rel=1e-6)


def test_lecam_state_survives_a_checkpoint() -> None:
    lecam = LeCam()
    lecam(torch.tensor([1.0, 3.0]), torch.tensor([-4.0]))
    assert lecam.ema_real.item() == pytest.approx(0.002)
    other = LeCam()
    other.load_state_dict(lecam.state_dict())
    assert torch.equal(other.ema_fake, lecam.ema_fake)


def test_r1_of_a_linear_function() -> None:
    video = torch.rand(3, 2, 2, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    penalty = r1_penalty((video * weight).sum((1, 2)), video)
    assert penalty.item() == pytest.approx(15.0)
    with pytest.raises(ValueError, match="requires_grad"):
        r1_penalty(torch.zeros(1), torch.zeros(1))


def test_r1_enters_the_discriminator_loss_with_its_weight() -> None:
    video = torch.rand(2, 3, requires_grad=True)
    logits = (video * 2).sum(1)
    _, parts = discriminator_loss(logits, torch.zeros(2), real_video=video)
    assert parts["r1"].item() == pytest.approx(10 * 12)


def test_entropy_weight_anneals_to_its_base() -> None:
    assert [round(entropy_weight(s), 6) for s in (0, 1000, 2000, 9000)] == [0.3, 0.2, 0.1, 0.1]
    assert entropy_weight(0, start_factor=4.0) == pytest.approx(0.4)
    assert entropy_weight(5, anneal_steps=0) == 0.1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="reconstruction: expected"):
        reconstruction_loss(torch.zeros(1, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="reading"):
        LeCam(reading="v3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay"):
        LeCam(decay=2.0)
    with pytest.raises(ValueError, match="lecam: expected 0 or more"):
        TokenizerLossWeights(lecam=-1.0)
    with pytest.raises(ValueError, match="gan: expected one of 'non_saturating', 'hinge'"):
        TokenizerLossWeights(gan="wgan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="distance: expected one of 'l2', 'l1'"):
        TokenizerLossWeights(distance="l0")  # type: ignore[arg-type]


def _one_rank(rank: int, path: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    real = torch.tensor([[1.0, -2.0], [0.5, 4.0]])[rank].requires_grad_()
    fake = torch.tensor([[0.3, -1.0], [2.0, -5.0]])[rank].requires_grad_()
    lecam = LeCam(decay=0.5)  # a decay at which the gradient through the averages is large
    loss = lecam(real, fake)
    loss.backward()
    torch.save(
        (loss.detach(), real.grad, fake.grad, lecam.ema_real, lecam.ema_fake), f"{out}{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_global_batch(tmp_path: Path) -> None:
    places = (str(tmp_path / "init"), str(tmp_path / "rank"))
    mp.start_processes(_one_rank, places, nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    real = torch.tensor([1.0, -2.0, 0.5, 4.0], requires_grad=True)
    fake = torch.tensor([0.3, -1.0, 2.0, -5.0], requires_grad=True)
    lecam = LeCam(decay=0.5)
    loss = lecam(real, fake)
    loss.backward()
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss.detach())
    # DDP averages gradients over processes: d(global loss) = (sum over ranks) / 2
    torch.testing.assert_close(torch.cat([ranks[0][1], ranks[1][1]]) / 2, real.grad)
    torch.testing.assert_close(torch.cat([ranks[0][2], ranks[1][2]]) / 2, fake.grad)
    for rank in ranks:
        torch.testing.assert_close(rank[3:], (lecam.ema_real, lecam.ema_fake))
