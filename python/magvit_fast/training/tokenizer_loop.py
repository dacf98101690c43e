"""Stage one: the tokenizer against its discriminator.

One pass through the generator serves both losses, and so does the discriminator's pass over its
output; both networks then step together (MAGVIT's released code). Recipe: MAGVIT-v2, appendix.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from magvit_fast.errors import FileFormatError
from magvit_fast.models.discriminator import Discriminator3D
from magvit_fast.models.inflation import InflationMode, inflate
from magvit_fast.models.magvit import MagvitConfig
from magvit_fast.models.tokenizers import load_tokenizer, new_tokenizer
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.training.checkpoints import latest_checkpoint
from magvit_fast.training.config import TokenizerTraining
from magvit_fast.training.ema import Ema
from magvit_fast.training.losses import (
    LeCam,
    discriminator_loss,
    entropy_weight,
    generator_loss,
)
from magvit_fast.training.perceptual import PerceptualLoss, load_resnet50
from magvit_fast.training.run import Run, TrainingResult, new_accelerator
from magvit_fast.training.sources import open_clips

log = logging.getLogger("magvit_fast")


def train_tokenizer(
    config: TokenizerTraining, *, perceptual: nn.Module | None = None, progress: bool = True
) -> TrainingResult:
    """Train (or go on training) a tokenizer; the result is the folder `config.run.output`/tokenizer.

    The result holds the averaged weights; the discriminator is left beside it, in discriminator.
    perceptual: a frozen network from images [N, 3, 224, 224] in [0, 1] to features, in place of the
    one that config.perceptual_weights names.
    """
    accelerator = new_accelerator(config.run)
    torch.manual_seed(config.run.seed)
    trainer = TokenizerTrainer(accelerator, config, perceptual)
    run = Run(accelerator, config)
    quiet = not accelerator.is_main_process
    source = open_clips(config.data, config.run.seed, quiet=quiet)
    result = run.train(
        source,
        run.order(source, config.data.image_ratio),
        modules=trainer.modules,
        optimizer=trainer.optimizer,
        forward_backward=trainer.forward_backward,
        finish_step=trainer.finish_step,
        progress=progress,
    )
    result.output = Path(config.run.output) / "tokenizer"
    if accelerator.is_main_process:
        trainer.ema.model.save_pretrained(result.output)
        if trainer.discriminator is not None:
            discriminator = accelerator.unwrap_model(trainer.discriminator)
            discriminator.save_pretrained(Path(config.run.output) / "discriminator")
    accelerator.wait_for_everyone()
    return result


class TokenizerTrainer:
    """The networks of stage one and what one step does to them."""

    def __init__(
        self, accelerator: Any, config: TokenizerTraining, perceptual: nn.Module | None = None
    ) -> None:
        self.accelerator, self.config = accelerator, config
        tokenizer = new_tokenizer(config.model)
        discriminator = _new_discriminator(config)
        if latest_checkpoint(Path(config.run.output) / "checkpoints") is None:
            _start(tokenizer, discriminator, config, accelerator.is_main_process)
        tokenizer.set_gradient_checkpointing(config.recompute_levels)
        self.perceptual = _perceptual_loss(config, perceptual, accelerator)
        reading: Literal["v1", "v2"] = "v1" if isinstance(config.model, MagvitConfig) else "v2"
        self.lecam = LeCam(config.loss.lecam_decay, reading).to(accelerator.device)
        self.networks = nn.ModuleDict({"tokenizer": tokenizer})
        if discriminator is not None:
            self.networks["discriminator"] = discriminator
        options = config.optimizer
        # One optimizer for both: they share every setting, and one gradient scaler then serves them.
        optimizer = torch.optim.AdamW(
            self.networks.parameters(),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )
        if discriminator is not None and config.run.mixed_precision == "fp16":
            # The gradient penalty's gradients would underflow in half precision.
            run_in_full_precision(discriminator, accelerator.device.type)
        *prepared, self.optimizer = accelerator.prepare(*self.networks.values(), optimizer)
        self.networks = nn.ModuleDict(dict(zip(self.networks, prepared, strict=True)))
        self.tokenizer = self.networks["tokenizer"]
        self.discriminator = self.networks["discriminator"] if discriminator is not None else None
        self.ema = Ema(accelerator.unwrap_model(self.tokenizer), config.ema_decay)
        self.modules = nn.ModuleDict({**self.networks, "ema": self.ema.model, "lecam": self.lecam})

    def forward_backward(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Losses of one part of a batch; their gradients are added to the networks'."""
        accelerator, weights = self.accelerator, self.config.loss
        video: Tensor = batch["video"]
        if self.config.model.frame_by_frame:
            video = frames_as_images(video)
        with accelerator.accumulate(*self.networks.values()):
            output = self.tokenizer(video)
            fake = output.reconstruction.float()
            logits_fake = self.discriminator(fake) if self.discriminator is not None else None
            factor = entropy_weight(
                step,
                base=1.0,
                start_factor=self.config.entropy.start_factor,
                anneal_steps=self.config.entropy.anneal_steps,
            )
            with accelerator.autocast():
                distance = self.perceptual(fake, video) if self.perceptual is not None else None
            total, parts = generator_loss(
                video,
                fake,
                quantizer=output.losses["quantizer"] + (factor - 1) * output.losses["entropy"],
                logits_fake=logits_fake,
                perceptual=distance,
                weights=weights,
            )
            adversary: dict[str, Tensor] = {}
            if self.discriminator is not None and logits_fake is not None:
                real = video.detach().requires_grad_(weights.r1 > 0)
                loss, adversary = discriminator_loss(
                    self.discriminator(real),
                    logits_fake,
                    lecam=self.lecam if weights.lecam > 0 else None,
                    real_video=real if weights.r1 > 0 else None,
                    weights=weights,
                )
                # Both losses cross the discriminator; each gradient stops at its own network.
                accelerator.backward(
                    total, inputs=list(self.tokenizer.parameters()), retain_graph=True
                )
                accelerator.backward(loss, inputs=list(self.discriminator.parameters()))
            else:
                accelerator.backward(total)
        return {
            "loss": total,
            "psnr": _psnr(fake.detach().clamp(0, 1), video),
            "codebook_entropy": output.losses["codebook_entropy"],
            "sample_entropy": output.losses["sample_entropy"],
            **parts,
            **{f"discriminator_{name}": value for name, value in adversary.items()},
        }

    def finish_step(self) -> dict[str, Tensor]:
        """Clip, step both networks, move the average."""
        values: dict[str, Tensor] = {}
        limit = self.config.optimizer.clip_norm
        if limit > 0:
            self.accelerator.unscale_gradients()
            for name, network in self.networks.items():
                norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
                values[f"{name}_gradient_norm"] = norm
        self.optimizer.step()
        self.ema.update(self.accelerator.unwrap_model(self.tokenizer))
        return values


def _start(
    tokenizer: VideoTokenizer,
    discriminator: Discriminator3D | None,
    config: TokenizerTraining,
    report: bool,
) -> None:
    """The recipe's starting weights."""
    if config.init_from:
        mode: InflationMode = "last" if tokenizer.config.causal else "central"
        start_from(tokenizer, load_tokenizer(config.init_from), config, mode, report)
    if config.init_discriminator_from and discriminator is not None:
        source = Discriminator3D.from_pretrained(config.init_discriminator_from)
        start_from(discriminator, source, config, "central", report)


def start_from(
    model: nn.Module,
    source: nn.Module,
    config: TokenizerTraining,
    published: InflationMode,
    report: bool = True,
) -> None:
    """Copy or inflate (models.inflation) the weights of a stored model.

    published: what inflation = "auto" means for this model. report: warn about parameters that keep
    their own values.

    Raises:
        FileFormatError: nothing of it fits.
    """
    mode = published if config.inflation == "auto" else config.inflation
    key = "init_discriminator_from" if isinstance(model, Discriminator3D) else "init_from"
    try:
        kept = inflate(model, source, mode)
    except ValueError as error:
        raise FileFormatError(f"{key}: {getattr(config, key)}: {error}") from error
    if kept and report:
        name = getattr(config, key)
        log.warning("%s: not in it or of another shape, so left as they are: %s", name, kept)


def frames_as_images(video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, 1, H, W]: a 2D tokenizer's losses are of single frames."""
    return video.movedim(2, 1).flatten(0, 1).unsqueeze(2)


def run_in_full_precision(module: nn.Module, device_type: str) -> None:
    """Keep autocast out of this module's forward pass."""
    module.forward = torch.autocast(device_type, enabled=False)(module.forward)


def _psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the clips of their PSNR in dB (clips weigh the same in any number of processes)."""
    errors = (prediction - target).square().flatten(1).mean(1)
    return (-10.0 * errors.clamp(min=1e-10).log10()).mean()


def _new_discriminator(config: TokenizerTraining) -> Discriminator3D | None:
    if config.loss.adversarial == 0:
        return None
    frames = 1 if config.model.frame_by_frame else config.data.frames
    clip = (frames, config.data.size, config.data.size)
    shape = dataclasses.replace(config.discriminator, clip=clip)
    if config.data.image_ratio > 0 and not shape.takes_images:
        raise ValueError(
            f"data.image_ratio: a discriminator of {len(shape.channel_multipliers)} blocks reduces "
            f"{clip[0]} frames to {shape.final_grid[0]}, so it takes no single images; give it more "
            "blocks or set image_ratio to 0"
        )
    return Discriminator3D(shape)


def _perceptual_loss(
    config: TokenizerTraining, network: nn.Module | None, accelerator: Any
) -> PerceptualLoss | None:
    if config.loss.perceptual == 0:
        return None
    if network is None and config.perceptual_weights:
        network = load_resnet50(config.perceptual_weights)
    if network is None:
        if accelerator.is_main_process:
            log.warning(
                "the perceptual loss is off: perceptual_weights names no folder or hub id of "
                "an ImageNet ResNet-50"
            )
        return None
    return PerceptualLoss(network).to(accelerator.device)
