"""Whole models in the GPU session: encode, decode, a training step, a generated clip.

Ours and PyTorch's way are the same modules, with impl="native" and impl="reference" behind every op, in
channels_last_3d and bfloat16 (the training step: bfloat16 by autocast, weights and Adam in float32).
Weights are drawn, not trained: the work does not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu_row import CHANNELS_LAST, Row

# FLOPs of one 17x128x128 clip through magvit-v2-base, padding counted: encoder, decoder.
ENCODE_FLOPS, DECODE_FLOPS = 4.471e12, 6.191e12
Impl = Literal["native", "reference"]


def _under(impl: Impl, call: Callable[..., Any], *inputs: Any) -> Any:
    from magvit_fast import _native

    with _native.default_impl(impl):
        return call(*inputs)


def _row(name: str, make: Callable[[], tuple[Any, ...]], call: Callable[..., Any], **facts: Any) -> Row:  # fmt: skip
    return Row(
        name, make, {"the same modules in PyTorch": functools.partial(_under, "reference", call)},
        functools.partial(_under, "native", call), rotate=False, sm90a=("gather", "weight_grad", "fused"), **facts,
    )  # fmt: skip


def _tokenizer(preset: str, device: str, dtype: torch.dtype) -> Any:
    import magvit_fast as mf

    kind = mf.models.MagvitV2Tokenizer if "v2" in preset else mf.models.MagvitTokenizer
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_preset(preset).to(dtype).eval()


@torch.no_grad()
def encode(tokenizer: Any, video: Tensor) -> Tensor:
    """Token ids of a video."""
    ids: Tensor = tokenizer.quantizer(tokenizer.encoder(video), with_losses=False).ids
    return ids


@torch.no_grad()
def decode(tokenizer: Any, latent: Tensor) -> Tensor:
    """A video of codes."""
    video: Tensor = tokenizer.decoder(latent)
    return video


def training_step(tokenizer: Any, optimizer: torch.optim.Optimizer, video: Tensor) -> Tensor:
    """The generator's step without discriminator and perceptual loss."""
    with torch.autocast(video.device.type, torch.bfloat16):
        quantized = tokenizer.quantizer(tokenizer.encoder(video))
        reconstruction = tokenizer.decoder(quantized.quantized)
        loss = (reconstruction.float() - video).square().mean() + quantized.losses["quantizer"]
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def generate_clip(
    tokenizer: Any, transformer: Any, settings: Any, condition: Tensor, classes: Tensor
) -> Tensor:
    """A clip of a class: the whole decoding loop and the decoder; nothing in it waits for the device."""
    from magvit_fast.decoding.masked import decode_masked

    def predict(tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = transformer(tokens, mask, class_id=classes)
        return logits

    nowhere = torch.zeros_like(condition, dtype=torch.bool)
    tokens = decode_masked(predict, condition, nowhere, settings)
    video: Tensor = tokenizer.decode(tokens.view(-1, *transformer.config.grid))
    return video


def tokenizer_rows(
    device: str = "cuda", preset: str = "magvit-v2-base", batch: int = 8, train_batch: int = 4,
    frames: int = 17, size: int = 128,
) -> Iterator[Row]:  # fmt: skip
    """Encode, decode and train; other sizes than the default's are for tests on small models."""
    dtype = torch.bfloat16
    shape = f"{frames}x{size}x{size}"

    def of_video() -> tuple[Any, ...]:
        video = torch.rand(batch, 3, frames, size, size, device=device, dtype=dtype)
        return _tokenizer(preset, device, dtype), video.contiguous(memory_format=CHANNELS_LAST)

    def of_latent() -> tuple[Any, ...]:
        tokenizer = _tokenizer(preset, device, dtype)
        grid = tokenizer.config.latent_shape(frames, size, size)
        latent = torch.randn(batch, tokenizer.config.num_bits, *grid, device=device).sign()
        return tokenizer, latent.to(dtype).contiguous(memory_format=CHANNELS_LAST)

    def of_training() -> tuple[Any, ...]:
        tokenizer = _tokenizer(preset, device, torch.float32).train()
        optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-4, betas=(0.0, 0.99), fused=True)
        video = torch.rand(train_batch, 3, frames, size, size, device=device)
        return tokenizer, optimizer, video.contiguous(memory_format=CHANNELS_LAST)

    yield _row(f"model: {preset} encode {shape} b{batch} bfloat16", of_video, encode,
               flops=ENCODE_FLOPS * batch, items=batch, compare=False)  # fmt: skip
    yield _row(f"model: {preset} decode {shape} b{batch} bfloat16", of_latent, decode,
               flops=DECODE_FLOPS * batch, items=batch)  # fmt: skip
    yield _row(f"model: {preset} training step {shape} b{train_batch} bfloat16", of_training,
               training_step, flops=3 * (ENCODE_FLOPS + DECODE_FLOPS) * train_batch,
               items=train_batch, compare=False, graph=False)  # fmt: skip


def generation_row(
    device: str = "cuda", tokenizer_preset: str = "magvit-b", transformer_preset: str = "magvit-b",
    batch: int = 8, steps: int = 12,
) -> Row:  # fmt: skip
    """Class-conditional generation to pixels, one CUDA graph if it can be captured."""
    import magvit_fast as mf
    from magvit_fast.decoding.masked import MaskedDecoding

    dtype = torch.bfloat16

    def make() -> tuple[Any, ...]:
        with torch.device(device):
            transformer = mf.models.MaskedTransformer.from_preset(
                transformer_preset, num_classes=101
            )
        slots, height, width = transformer.config.grid
        condition = torch.zeros(batch, slots * height * width, dtype=torch.int64, device=device)
        classes = torch.arange(batch, device=device)
        return (_tokenizer(tokenizer_preset, device, dtype), transformer.to(dtype).eval(),
                MaskedDecoding(steps=steps), condition, classes)  # fmt: skip

    return _row(f"model: {transformer_preset} generates 16x128x128, {steps} steps, b{batch} bfloat16",
                make, generate_clip, items=batch * 16, item="frames", compare=False)  # fmt: skip
