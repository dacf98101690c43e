"""What is measured of a whole tokenizer: encode, decode, the generator's training step. Weights are drawn, not trained:
the work does not depend on them.

Used by e2e_tokenizer.py (CPU) and gpu_models.py (the GPU session).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def drawn_tokenizer(preset: str, device: str, dtype: torch.dtype) -> Any:
    """The preset's tokenizer, in inference mode."""
    import magvit_fast as mf  # here: the GPU session builds the cores before it loads them

    kind = mf.models.MagvitV2Tokenizer if "v2" in preset else mf.models.MagvitTokenizer
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_preset(preset).to(dtype).eval()


def noise(
    batch: int, frames: int, size: int, device: str, dtype: torch.dtype, layout: torch.memory_format
) -> Tensor:
    """A video [batch, 3, frames, size, size]."""
    video = torch.rand(batch, 3, frames, size, size, device=device, dtype=dtype)
    return video.contiguous(memory_format=layout)


def codes(
    tokenizer: Any, batch: int, frames: int, size: int, device: str, dtype: torch.dtype,
    layout: torch.memory_format,
) -> Tensor:  # fmt: skip
    """What the decoder takes for a video of this size."""
    grid = tokenizer.config.latent_shape(frames, size, size)
    signs = torch.randn(batch, tokenizer.config.num_bits, *grid, device=device).sign()
    return signs.to(dtype).contiguous(memory_format=layout)


@torch.no_grad()
def encode(tokenizer: Any, video: Tensor) -> Tensor:
    """Token ids of a video."""
    # Not tokenizer.encode, which brings every video into channels_last_3d.
    ids: Tensor = tokenizer.quantizer(tokenizer.encoder(video), with_losses=False).ids
    return ids


@torch.no_grad()
def decode(tokenizer: Any, latent: Tensor) -> Tensor:
    """A video of codes."""
    video: Tensor = tokenizer.decoder(latent).clamp(0, 1)
    return video


def generator_loss(tokenizer: Any, video: Tensor) -> Tensor:
    """Reconstruction and quantizer losses, without discriminator and perceptual loss."""
    quantized = tokenizer.quantizer(tokenizer.encoder(video))
    reconstruction = tokenizer.decoder(quantized.quantized)
    error = (reconstruction.float() - video.float()).square().mean()
    loss: Tensor = error + quantized.losses["quantizer"]
    return loss


def adam(tokenizer: Any, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.Adam(tokenizer.parameters(), lr=1e-4, betas=(0.0, 0.99), fused=fused)


def training_step(
    tokenizer: Any, optimizer: torch.optim.Optimizer, video: Tensor,
    autocast: torch.dtype | None = None, loss_of: Callable[..., Tensor] = generator_loss,
) -> Tensor:  # fmt: skip
    """The generator's step: losses, backward, the optimizer; its loss."""
    with torch.autocast(video.device.type, autocast) if autocast else contextlib.nullcontext():
        loss = loss_of(tokenizer, video)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
