"""Runs with a gradient scaler (mixed_precision = "fp16"), which Accelerate allows on GPUs only: here the
scaler is a CPU one, put into the accelerator by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny import tokenizer_recipe

from magvit_fast.errors import MagvitFastError
from magvit_fast.training import tokenizer_loop
from magvit_fast.training.checkpoints import load_checkpoint, save_checkpoint
from magvit_fast.training.config import OptimizerConfig
from magvit_fast.training.losses import TokenizerLossWeights
from magvit_fast.training.run import new_accelerator
from magvit_fast.training.tokenizer_loop import TokenizerTrainer, train_tokenizer

CLIPPED = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, clip_norm=1.0)


def scaled_accelerator(config, init_scale=1024.0):
    accelerator = new_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return accelerator


def scaled_trainer(tmp_path, **changes):
    recipe = tokenizer_recipe(
        tmp_path, loss=TokenizerLossWeights(adversarial=0.0), optimizer=CLIPPED
    )
    torch.manual_seed(0)
    return TokenizerTrainer(scaled_accelerator(recipe.run, **changes), recipe)


def step(trainer, *, overflow=False):
    video = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    trainer.forward_backward({"video": video}, 0, 0)
    if overflow:
        next(trainer.tokenizer.parameters()).grad.view(-1)[0] = float("inf")
    trainer.finish_step()
    trainer.optimizer.zero_grad()


def save(trainer, folder):
    return save_checkpoint(
        trainer.accelerator, folder, 1, modules=trainer.modules, optimizer=trainer.optimizer,
        recipe={}, keep=1,
    )  # fmt: skip


def load(trainer, path):
    load_checkpoint(
        trainer.accelerator, path, modules=trainer.modules, optimizer=trainer.optimizer, recipe={}
    )


def assert_step_alike(one, two):
    for trainer in (one, two):
        step(trainer)
    expected = one.modules.state_dict()
    for name, value in two.modules.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_run_goes_on_with_a_fresh_scaler(tmp_path):
    """The overflow halves the scale, which the fresh scaler must take over."""
    one = scaled_trainer(tmp_path)
    step(one)
    step(one, overflow=True)
    path = save(one, tmp_path / "checkpoints")
    two = scaled_trainer(tmp_path, init_scale=8.0)
    load(two, path)
    assert two.accelerator.scaler.get_scale() == 512.0
    assert_step_alike(one, two)
    assert two.accelerator.scaler.state_dict() == one.accelerator.scaler.state_dict()
    assert two.accelerator.scaler.state_dict()["_growth_tracker"] == 1


def test_saving_after_skipped_steps_alone_counts_no_step(tmp_path):
    one, other = scaled_trainer(tmp_path), scaled_trainer(tmp_path)
    for trainer in (one, other):
        step(trainer, overflow=True)
    path = save(one, tmp_path / "checkpoints")
    assert not one.optimizer.state
    assert not load_file(path / "optimizer.safetensors")
    resumed = scaled_trainer(tmp_path)
    load(resumed, path)
    assert not resumed.optimizer.state
    assert_step_alike(other, one)
    steps = {int(state["step"]) for state in one.optimizer.state.values()}
    assert steps == {1}
    step(resumed)
    expected = one.modules.state_dict()
    for name, value in resumed.modules.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_an_overflow_is_no_divergence(tmp_path, monkeypatch):
    """Its step is skipped and the scale halved; the gradients' norm of that step is infinite."""
    scalers = []

    def accelerator(config):
        made = scaled_accelerator(config)
        scalers.append(made.scaler)
        return made

    def finish_step(trainer, real=TokenizerTrainer.finish_step):
        calls.append(trainer)
        if len(calls) == 2:
            next(trainer.tokenizer.parameters()).grad.view(-1)[0] = float("inf")
        return real(trainer)

    calls: list[TokenizerTrainer] = []
    monkeypatch.setattr(tokenizer_loop, "new_accelerator", accelerator)
    monkeypatch.setattr(TokenizerTrainer, "finish_step", finish_step)
    recipe = tokenizer_recipe(tmp_path, optimizer=CLIPPED)
    history = train_tokenizer(recipe, progress=False).history
    assert [h["step"] for h in history] == [1, 2, 3, 4]
    assert history[1]["tokenizer_gradient_norm"] == float("inf")
    assert scalers[0].get_scale() == 512.0


def test_a_loss_that_is_not_finite_stops_a_run_with_a_scaler_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_loop, "new_accelerator", scaled_accelerator)
    recipe = tokenizer_recipe(
        tmp_path, steps=20, loss=TokenizerLossWeights(adversarial=0.0),
        optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=1, clip_norm=1.0),
    )  # fmt: skip
    with pytest.raises(MagvitFastError, match="no longer finite"):
        train_tokenizer(recipe, progress=False)
