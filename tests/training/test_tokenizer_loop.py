"""Stage one: gradients, resuming, and what ends up on disk."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import SCENES, tokenizer_recipe
from torch import nn

from magvit_fast.errors import FileFormatError, FileWriteError, MagvitFastError
from magvit_fast.models.magvit_v2 import MagvitV2Tokenizer
from magvit_fast.training.config import TokenizerTraining, load_recipe
from magvit_fast.training.losses import (
    TokenizerLossWeights,
    discriminator_adversarial_loss,
    generator_adversarial_loss,
    r1_penalty,
    reconstruction_loss,
)
from magvit_fast.training.run import Run, new_accelerator
from magvit_fast.training.sources import open_clips
from magvit_fast.training.tokenizer_loop import (
    TokenizerTrainer,
    run_in_full_precision,
    train_tokenizer,
)


def video(batch=2, frames=5):
    return torch.rand(batch, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0))


def trainer(tmp_path, **changes):
    recipe = tokenizer_recipe(tmp_path, **changes)
    torch.manual_seed(0)
    return TokenizerTrainer(new_accelerator(recipe.run), recipe)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_shared_passes_give_each_network_its_own_gradient(tmp_path):
    """Against separate passes: the generator through a fixed discriminator, then the latter alone."""
    weights = TokenizerLossWeights(lecam=0.0)
    one = trainer(tmp_path, loss=weights)
    one.forward_backward({"video": video()}, step=5000, part=0)
    shared = gradients(one.tokenizer), gradients(one.discriminator)

    two = trainer(tmp_path, loss=weights)
    output = two.tokenizer(video())
    total = (
        5.0 * reconstruction_loss(output.reconstruction, video())
        + 0.1 * generator_adversarial_loss(two.discriminator(output.reconstruction))
        + output.losses["quantizer"]
    )
    total.backward()
    for name, parameter in two.tokenizer.named_parameters():
        torch.testing.assert_close(shared[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
    two.discriminator.zero_grad()
    real = video().requires_grad_(True)
    logits_real = two.discriminator(real)
    loss = discriminator_adversarial_loss(
        logits_real, two.discriminator(output.reconstruction.detach())
    ) + 10.0 * r1_penalty(logits_real, real)
    loss.backward()
    for name, parameter in two.discriminator.named_parameters():
        torch.testing.assert_close(shared[1][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_entropy_is_annealed(tmp_path):
    values = [
        trainer(tmp_path).forward_backward({"video": video()}, step, 0) for step in (0, 1000, 2000)
    ]
    commitment = [
        v["quantizer"] - f * 0.1 * (v["sample_entropy"] - v["codebook_entropy"])
        for v, f in zip(values, (3.0, 2.0, 1.0), strict=True)
    ]
    torch.testing.assert_close(commitment[0], commitment[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(commitment[0], commitment[2], rtol=1e-4, atol=1e-6)


def test_accumulated_parts_equal_the_whole_batch(tmp_path):
    """For the losses that are means over clips (the codebook's entropy belongs to a part)."""
    model = dataclasses.replace(tokenizer_recipe(tmp_path).model, entropy_weight=0.0)
    settings = {"model": model, "loss": TokenizerLossWeights(lecam=0.0)}
    whole = trainer(tmp_path, **settings)
    whole.forward_backward({"video": video(4)}, 0, 0)
    parts = trainer(tmp_path, gradient_accumulation=2, **settings)
    for i, part in enumerate(video(4).chunk(2)):
        parts.forward_backward({"video": part}, 0, i)
    for name in ("tokenizer", "discriminator"):
        expected = gradients(whole.networks[name])
        for key, value in gradients(parts.networks[name]).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def test_a_step_moves_networks_and_average(tmp_path):
    one = trainer(tmp_path)
    before = {k: v.clone() for k, v in one.modules.state_dict().items()}
    one.forward_backward({"video": video()}, 0, 0)
    one.finish_step()
    for key, value in one.modules.state_dict().items():
        assert not torch.equal(value, before[key]), key
    for key, value in one.tokenizer.state_dict().items():
        average = one.ema.model.state_dict()[key]
        torch.testing.assert_close(average, 0.999 * before[f"ema.{key}"] + 0.001 * value)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation": 2, "data": {"image_ratio": 0.5}}]
)
def test_resuming_continues_exactly(tmp_path, changes):
    """Six steps at once, against three, a stop, and three more: every bit of state and every loss."""
    changes = dict(changes)
    data = dataclasses.replace(SCENES, **changes.pop("data", {}))
    settings = {"steps": 6, "checkpoint_every": 3, "data": data, **changes}
    straight = train_tokenizer(tokenizer_recipe(tmp_path / "a", **settings), progress=False)
    shutil.copytree(
        tmp_path / "a/checkpoints/step-00000003", tmp_path / "b/checkpoints/step-00000003"
    )
    torch.manual_seed(99)  # the random state at the restart does not matter
    resumed = train_tokenizer(
        tokenizer_recipe(tmp_path / "b", workers=1, **settings), progress=False
    )
    assert [h["step"] for h in straight.history] == [1, 2, 3, 4, 5, 6]
    assert resumed.history == straight.history[3:]
    for file in ("model.safetensors", "optimizer.safetensors"):
        a = load_file(tmp_path / "a/checkpoints/step-00000006" / file)
        b = load_file(tmp_path / "b/checkpoints/step-00000006" / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(
        k.startswith("lecam.")
        for k in load_file(tmp_path / "a/checkpoints/step-00000006/model.safetensors")
    )


def test_result_is_the_averaged_tokenizer(tmp_path):
    result = train_tokenizer(tokenizer_recipe(tmp_path, steps=2), progress=False)
    stored = load_file(tmp_path / "checkpoints/step-00000002/model.safetensors")
    model = MagvitV2Tokenizer.from_pretrained(result.output)
    assert result.output == tmp_path / "tokenizer"
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[f"ema.{key}"])
    # A finished run is not run again, and gives the same result.
    again = train_tokenizer(tokenizer_recipe(tmp_path, steps=2), progress=False)
    assert again.history == []


def test_it_learns(tmp_path):
    data = dataclasses.replace(SCENES, scenes=2)
    weights = TokenizerLossWeights(adversarial=0.0)
    recipe = tokenizer_recipe(tmp_path, steps=25, batch_size=2, data=data, loss=weights)
    recipe = dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, learning_rate=3e-3)
    )
    history = train_tokenizer(recipe, progress=False).history
    assert history[-1]["psnr"] > history[0]["psnr"] + 2.0
    assert "discriminator_adversarial" not in history[0]


@pytest.mark.parametrize(
    ("model", "frames", "pooling"),
    [
        ('quantizer = "vq"\nembedding_dim = 4', 5, "blur"),
        (
            'quantizer = "vq"\ncausal = false\nresample = "pool"\nadaptive_norm = false',
            4,
            "average",
        ),
        ("causal = false", 4, "blur"),
        ('resample = "pool"\ntemporal_downsample = [true, false]', 5, "average"),
    ],
)
def test_the_variants_of_the_ablations_train_from_a_recipe(tmp_path, model, frames, pooling):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'''[run]
output = "{tmp_path / "run"}"
steps = 2
batch_size = 2
workers = 0
log_every = 1
tensorboard = false
[data]
source = "scenes"
scenes = 4
frames = {frames}
size = 16
[model]
filters = 8
channel_multipliers = [1, 2, 2]
{model if "temporal" in model else model + chr(10) + "temporal_downsample = [false, true]"}
num_res_blocks = 1
num_bits = 6
[discriminator]
filters = 4
channel_multipliers = [2, 2, 2]
pooling = "{pooling}"
'''
    )
    config = load_recipe(recipe, TokenizerTraining)
    result = train_tokenizer(config, progress=False)
    assert len(result.history) == 2
    stored = MagvitV2Tokenizer.from_pretrained(result.output)
    assert stored.config == config.model
    ids = stored.encode(video(1, frames))
    assert ids.shape == (1, *config.model.latent_shape(frames, 16, 16))
    assert stored.decode(ids).shape == (1, 3, frames, 16, 16)


def test_missing_perceptual_network_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        train_tokenizer(tokenizer_recipe(tmp_path, steps=2), progress=False)
    assert sum("perceptual loss is off" in r.getMessage() for r in caplog.records) == 1


def test_any_module_serves_as_perceptual_network(tmp_path, caplog):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        recipe = tokenizer_recipe(tmp_path, steps=1)
        history = train_tokenizer(recipe, perceptual=network, progress=False).history
    assert history[0]["perceptual"] > 0
    assert "perceptual" not in caplog.text


def test_recomputing_activations_changes_nothing(tmp_path):
    plain, recomputed = trainer(tmp_path), trainer(tmp_path, recompute_levels=(0, 1))
    for one in (plain, recomputed):
        one.forward_backward({"video": video()}, 0, 0)
    expected = gradients(plain.tokenizer)
    for key, value in gradients(recomputed.tokenizer).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


def test_bfloat16_runs(tmp_path):
    recipe = tokenizer_recipe(tmp_path, steps=2, mixed_precision="bf16")
    history = train_tokenizer(recipe, progress=False).history
    stored = load_file(tmp_path / "checkpoints/step-00000002/model.safetensors")
    assert all(v.dtype == torch.float32 for v in stored.values())
    assert len(history) == 2


def test_one_gradient_scaler_serves_both_networks(tmp_path):
    """As with fp16, which Accelerate allows on GPUs only: same step, and overflow skips it for both."""
    weights = TokenizerLossWeights(lecam=0.0)
    plain = trainer(tmp_path, loss=weights)
    recipe = tokenizer_recipe(tmp_path, loss=weights)
    torch.manual_seed(0)
    accelerator = new_accelerator(recipe.run)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = TokenizerTrainer(accelerator, recipe)
    for one in (plain, scaled):
        one.forward_backward({"video": video()}, 0, 0)
    for name, expected in gradients(plain.networks).items():
        value = gradients(scaled.networks)[name] / 1024
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    scaled.discriminator.logit.weight.grad[0, 0] = float("inf")
    before = {k: v.clone() for k, v in scaled.networks.state_dict().items()}
    scaled.finish_step()
    assert all(torch.equal(v, before[k]) for k, v in scaled.networks.state_dict().items())
    assert accelerator.scaler.get_scale() == 512.0
    scaled.optimizer.zero_grad()
    scaled.forward_backward({"video": video()}, 0, 0)
    scaled.finish_step()
    assert not any(torch.equal(v, before[k]) for k, v in scaled.networks.state_dict().items())


def test_full_precision_keeps_autocast_out():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.rand(2, 3)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        run_in_full_precision(layer, "cpu")
        assert torch.equal(layer(x), expected)


def test_divergence_stops_with_a_clear_error(tmp_path):
    recipe = tokenizer_recipe(tmp_path, steps=20, loss=TokenizerLossWeights(adversarial=0.0))
    recipe = dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1e38)
    )
    with pytest.raises(MagvitFastError, match=r"no longer finite; lower optimizer\.learning_rate"):
        train_tokenizer(recipe, progress=False)


def test_the_newest_checkpoint_is_finite(tmp_path, monkeypatch):
    """Between two lines of the log checkpoints of a diverged run would push out the good ones."""
    finish_step, calls = TokenizerTrainer.finish_step, []

    def spoiled(self):
        values = finish_step(self)
        calls.append(0)
        if len(calls) == 4:
            next(self.tokenizer.parameters()).data.view(-1)[0] = float("nan")
        return values

    monkeypatch.setattr(TokenizerTrainer, "finish_step", spoiled)
    recipe = tokenizer_recipe(
        tmp_path, steps=20, log_every=20, checkpoint_every=2, keep_checkpoints=1,
        loss=TokenizerLossWeights(adversarial=0.0),
    )  # fmt: skip
    with pytest.raises(MagvitFastError, match=r"step 4: .* no longer finite; lower optimizer"):
        train_tokenizer(recipe, progress=False)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert kept.name == "step-00000002"


def test_processes_wait_for_each_other_for_days(tmp_path):
    """The shares of a data set that they tokenize take hours, and differ."""
    accelerator = new_accelerator(tokenizer_recipe(tmp_path).run)
    assert accelerator.init_handler.timeout > timedelta(days=1)


def test_an_output_that_cannot_be_written_stops_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    recipe = tokenizer_recipe(tmp_path / "file")
    monkeypatch.setattr(
        "magvit_fast.training.tokenizer_loop.TokenizerTrainer",
        lambda *_: pytest.fail("training was prepared first"),
    )
    with pytest.raises(FileWriteError, match="cannot write"):
        train_tokenizer(recipe, progress=False)


def test_bad_recipes_stop_before_training(tmp_path):
    images = dataclasses.replace(SCENES, image_ratio=0.5)
    shallow = dataclasses.replace(
        tokenizer_recipe(tmp_path).discriminator, channel_multipliers=(2,)
    )
    with pytest.raises(ValueError, match="image_ratio: a discriminator of 1 blocks"):
        train_tokenizer(tokenizer_recipe(tmp_path, data=images, discriminator=shallow))
    empty = dataclasses.replace(SCENES, source="videos", path=str(tmp_path))
    with pytest.raises(FileFormatError, match="no usable video"):
        train_tokenizer(tokenizer_recipe(tmp_path, data=empty))
    with pytest.raises(ValueError, match=r"run\.batch_size: expected a multiple of"):
        Run(SimpleNamespace(num_processes=3, process_index=0), tokenizer_recipe(tmp_path)).order(
            open_clips(SCENES, 0)
        )
    train_tokenizer(tokenizer_recipe(tmp_path, steps=2), progress=False)
    with pytest.raises(FileFormatError, match=r"run\.seed: 0 there, 1 now"):
        train_tokenizer(tokenizer_recipe(tmp_path, steps=2, seed=1), progress=False)


def test_tensorboard_and_progress_bar(tmp_path, capsys):
    recipe = tokenizer_recipe(tmp_path, steps=2, tensorboard=True)
    train_tokenizer(recipe)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "loss=" in shown
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
