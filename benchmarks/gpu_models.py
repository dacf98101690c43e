"""Whole models in the GPU session: encode, decode, a training step, a generated clip.

Ours and PyTorch's way are the same modules, with impl="native" and impl="reference" behind every op, in
channels_last_3d and bfloat16 (the training step: bfloat16 by autocast, weights and Adam in float32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import tokenizer_work
from benchmarks.gpu_row import CHANNELS_LAST, Compiled, Row

# FLOPs of one 17x128x128 clip through magvit-v2-base, padding counted: encoder, decoder.
ENCODE_FLOPS, DECODE_FLOPS = 4.471e12, 6.191e12
MODEL_COMPILE_SECONDS = 75.0  # that torch.compile of one model may take
Impl = Literal["native", "reference"]


def _under(impl: Impl, call: Callable[..., Any], *inputs: Any) -> Any:
    from magvit_fast import _native

    with _native.default_impl(impl):
        return call(*inputs)


def _row(
    name: str, make: Callable[[], tuple[Any, ...]], call: Callable[..., Any],
    compiled: Compiled | None = None, **facts: Any,
) -> Row:  # fmt: skip
    """compiled: what of `call` torch.compile gets, where that is not all of it."""
    compiled = compiled or (lambda compiler: compiler(call))
    return Row(
        name, make, {"the same modules in PyTorch": functools.partial(_under, "reference", call)},
        functools.partial(_under, "native", call), rotate=False,
        sm90a=("gather", "weight_grad", "fused"),
        compiled=lambda compiler: functools.partial(_under, "reference", compiled(compiler)),
        compile_seconds=MODEL_COMPILE_SECONDS, **facts,
    )  # fmt: skip


def predict_logits(transformer: Any, tokens: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
    logits: Tensor = transformer(tokens, mask, class_id=classes)
    return logits


@torch.no_grad()
def generate_clip(
    tokenizer: Any, transformer: Any, settings: Any, condition: Tensor, classes: Tensor,
    logits_of: Callable[..., Tensor] = predict_logits,
) -> Tensor:  # fmt: skip
    """A clip of a class: the whole decoding loop and the decoder; nothing in it waits for the device."""
    from magvit_fast.decoding.masked import decode_masked

    def predict(tokens: Tensor, mask: Tensor) -> Tensor:
        return logits_of(transformer, tokens, mask, classes)

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
    step = functools.partial(tokenizer_work.training_step, autocast=dtype)

    def of_video() -> tuple[Any, ...]:
        video = tokenizer_work.noise(batch, frames, size, device, dtype, CHANNELS_LAST)
        return tokenizer_work.drawn_tokenizer(preset, device, dtype), video

    def of_latent() -> tuple[Any, ...]:
        tokenizer = tokenizer_work.drawn_tokenizer(preset, device, dtype)
        return tokenizer, tokenizer_work.codes(
            tokenizer, batch, frames, size, device, dtype, CHANNELS_LAST
        )

    def of_training() -> tuple[Any, ...]:
        tokenizer = tokenizer_work.drawn_tokenizer(preset, device, torch.float32).train()
        video = tokenizer_work.noise(
            train_batch, frames, size, device, torch.float32, CHANNELS_LAST
        )
        return tokenizer, tokenizer_work.adam(tokenizer, fused=True), video

    def compiled_step(compiler: Callable[..., Any]) -> Callable[..., Any]:
        # Backward and optimizer are not traced: the former is compiled with the loss.
        return functools.partial(step, loss_of=compiler(tokenizer_work.generator_loss))

    yield _row(f"model: {preset} encode {shape} b{batch} bfloat16", of_video,
               tokenizer_work.encode, flops=ENCODE_FLOPS * batch, items=batch, compare=False)  # fmt: skip
    yield _row(f"model: {preset} decode {shape} b{batch} bfloat16", of_latent,
               tokenizer_work.decode, flops=DECODE_FLOPS * batch, items=batch)  # fmt: skip
    yield _row(f"model: {preset} training step {shape} b{train_batch} bfloat16", of_training,
               step, compiled_step, flops=3 * (ENCODE_FLOPS + DECODE_FLOPS) * train_batch,
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
        return (tokenizer_work.drawn_tokenizer(tokenizer_preset, device, dtype), transformer.to(dtype).eval(),
                MaskedDecoding(steps=steps), condition, classes)  # fmt: skip

    def compiled_loop(compiler: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(generate_clip, logits_of=compiler(predict_logits))

    return _row(f"model: {transformer_preset} generates 16x128x128, {steps} steps, b{batch} bfloat16",
                make, generate_clip, compiled_loop, items=batch * 16, item="frames", compare=False)  # fmt: skip
