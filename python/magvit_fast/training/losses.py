"""Losses of tokenizer training: reconstruction, GAN, R1, LeCam, totals, entropy annealing.

Sources: MAGVIT-v2 appendix A.2 (weights), MAGVIT appendix A.1, and Google's released layers for the
exact forms. All means are over elements or over the batch, so equal local batches average to the
global loss under DDP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast.ops._checks import check_choice
from magvit_fast.ops._sync import mean_over_processes

Distance = Literal["l2", "l1"]
AdversarialKind = Literal["non_saturating", "hinge"]


@dataclass(frozen=True)
class TokenizerLossWeights:
    """Weights of the published MAGVIT-v2 recipe, and the forms of two losses.

    The quantizer's total (commitment 0.25, entropy 0.1) carries its weights already. distance: of
    the reconstruction; gan: of both adversarial losses. All published recipes keep the defaults;
    the released MAGVIT code has the other two as options.
    """

    reconstruction: float = 5.0
    perceptual: float = 0.1
    adversarial: float = 0.1
    r1: float = 10.0
    lecam: float = 0.001
    lecam_decay: float = 0.999
    distance: Distance = "l2"
    gan: AdversarialKind = "non_saturating"

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, get_args(Distance))
        check_choice("gan", self.gan, get_args(AdversarialKind))
        for name, value in vars(self).items():
            if isinstance(value, float | int) and value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        if self.lecam_decay > 1:
            raise ValueError(f"lecam_decay: expected a value in [0, 1], got {self.lecam_decay}")


def reconstruction_loss(reconstruction: Tensor, video: Tensor, distance: Distance = "l2") -> Tensor:
    """Mean squared ("l1": absolute) error over all elements of two videos [B, C, T, H, W] in [0, 1],
    in float32."""
    if reconstruction.shape != video.shape:
        raise ValueError(
            f"reconstruction: expected {tuple(video.shape)} (the video's), "
            f"got {tuple(reconstruction.shape)}"
        )
    ours, theirs = _at_least_float32(reconstruction), _at_least_float32(video)
    return F.mse_loss(ours, theirs) if distance == "l2" else F.l1_loss(ours, theirs)


def generator_adversarial_loss(
    logits_fake: Tensor, kind: AdversarialKind = "non_saturating"
) -> Tensor:
    """Mean of softplus(-D(fake)); "hinge": of -D(fake)."""
    fake = _at_least_float32(logits_fake)
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_adversarial_loss(
    logits_real: Tensor, logits_fake: Tensor, kind: AdversarialKind = "non_saturating"
) -> Tensor:
    """Binary cross-entropy: mean softplus(-D(real)) + mean softplus(D(fake)).

    "hinge": mean relu(1 - D(real)) + mean relu(1 + D(fake)).
    """
    real, fake = _at_least_float32(logits_real), _at_least_float32(logits_fake)
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(logits_real: Tensor, video: Tensor) -> Tensor:
    """Batch mean of |dD/dvideo|^2 on real clips (no factor 1/2), differentiable again.

    `video` [B, ...] must require a gradient and have produced `logits_real`.
    """
    if not video.requires_grad:
        raise ValueError(
            "video: expected a tensor with requires_grad=True (set it before the discriminator)"
        )
    (gradient,) = torch.autograd.grad(logits_real.sum(), video, create_graph=True)
    return _at_least_float32(gradient).square().flatten(1).sum(1).mean()


class LeCam(nn.Module):
    """LeCam regularizer of the discriminator, with the moving averages of its logits as buffers.

    reading "v2" (Google's released MAGVIT-v2 layers): the averages take in the batch first, then
        mean(relu(real - ema_fake)^2) + mean(relu(ema_real - fake)^2), each sample by itself. The
        gradient flows through the update of the averages too.
    reading "v1" (the released MAGVIT code): batch-mean logits against the averages before the
    update. The averages start at 0 without bias correction. They are float32 whatever the model's
    dtype, part of the state dict, and move at every call, in evaluation as well. With
    torch.distributed initialized the means are those of the global batch, so all processes keep the
    same averages.
    """

    ema_real: Tensor
    ema_fake: Tensor

    def __init__(self, decay: float = 0.999, reading: Literal["v1", "v2"] = "v2") -> None:
        super().__init__()
        if reading not in ("v1", "v2"):
            raise ValueError(f"reading: expected 'v1' or 'v2', got {reading!r}")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay: expected a value in [0, 1], got {decay}")
        self.decay = decay
        self.reading = reading
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Logits of any shape -> the unweighted regularizer (scalar)."""
        real, fake = _at_least_float32(logits_real), _at_least_float32(logits_fake)
        mean_real, mean_fake = mean_over_processes(real.mean()), mean_over_processes(fake.mean())
        before_real, before_fake = self.ema_real.clone(), self.ema_fake.clone()
        after_real = self.decay * before_real + (1 - self.decay) * mean_real
        after_fake = self.decay * before_fake + (1 - self.decay) * mean_fake
        self.ema_real.copy_(after_real.detach())
        self.ema_fake.copy_(after_fake.detach())
        if self.reading == "v1":
            return (
                F.relu(mean_real - before_fake).square() + F.relu(before_real - mean_fake).square()
            )
        return F.relu(real - after_fake).square().mean() + F.relu(after_real - fake).square().mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def entropy_weight(
    step: int, *, base: float = 0.1, start_factor: float = 3.0, anneal_steps: int = 2000
) -> float:
    """Weight of the codebook entropy at a step: base * start_factor falling linearly to base.

    The notes on MAGVIT-v2 read "x3 at the start" (start_factor 3); the form w * (1 + 3 * remaining)
    of MAGVIT's code starts at 4 times the base: start_factor 4.
    """
    if anneal_steps < 1:
        return base
    remaining = max(0.0, 1.0 - step / anneal_steps)
    return base * (1.0 + (start_factor - 1.0) * remaining)


def generator_loss(
    video: Tensor,
    reconstruction: Tensor,
    *,
    quantizer: Tensor | None = None,
    logits_fake: Tensor | None = None,
    perceptual: Tensor | None = None,
    weights: TokenizerLossWeights | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total generator loss and its weighted parts.

    quantizer: the quantizer's total (TokenizerOutput.losses["quantizer"]), weighted already.
    perceptual: an unweighted distance. Whatever is None leaves its term out; so does logits_fake
    for the adversarial term.
    """
    weights = weights or TokenizerLossWeights()
    distance = reconstruction_loss(reconstruction, video, weights.distance)
    parts = {"reconstruction": weights.reconstruction * distance}
    if quantizer is not None:
        parts["quantizer"] = quantizer
    if perceptual is not None:
        parts["perceptual"] = weights.perceptual * perceptual
    if logits_fake is not None:
        adversarial = generator_adversarial_loss(logits_fake, weights.gan)
        parts["adversarial"] = weights.adversarial * adversarial
    return torch.stack(list(parts.values())).sum(), parts


def discriminator_loss(
    logits_real: Tensor,
    logits_fake: Tensor,
    *,
    lecam: LeCam | None = None,
    real_video: Tensor | None = None,
    weights: TokenizerLossWeights | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total discriminator loss and its weighted parts.

    real_video: the clip (requires_grad) behind logits_real, for the R1 penalty; None leaves it out.
    lecam: the module whose averages move with this call; None leaves it out.
    """
    weights = weights or TokenizerLossWeights()
    parts = {"adversarial": discriminator_adversarial_loss(logits_real, logits_fake, weights.gan)}
    if real_video is not None and weights.r1 > 0:
        parts["r1"] = weights.r1 * r1_penalty(logits_real, real_video)
    if lecam is not None:
        parts["lecam"] = weights.lecam * lecam(logits_real, logits_fake)
    return torch.stack(list(parts.values())).sum(), parts
