"""Autoregressive decoding: one pass of the network a token, with a key-value cache.

The baseline that masked decoding is compared with (MAGVIT, table 6: 1,024 passes against 12).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from magvit_fast.decoding.masked import check_sampling, cut_noise, guided
from magvit_fast.decoding.schedules import Guidance
from magvit_fast.models.autoregressive_transformer import AutoregressiveTransformer
from magvit_fast.nn.embedding import pack_subtokens
from magvit_fast.ops.confidence_remask import VALUE_STREAM, gumbel


@dataclass(frozen=True)
class AutoregressiveDecoding:
    """How to sample.

    temperature: of the sampled values (0 = the most likely one). top_k, top_p: see MaskedDecoding.
    seed: keys the counter-based random numbers; the same seed gives the same tokens on one device.
    guidance: classifier-free guidance over the logits, as in MaskedDecoding; token i of N is at
        progress (i + 1) / N. It takes a second pass a token, with a cache of its own.
    cached: keep keys and values of earlier tokens; False runs all of them again in every pass (the
        same tokens, N / 2 times the work; what tests compare with).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    cached: bool = True

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)


@torch.no_grad()
def decode_autoregressive(
    transformer: AutoregressiveTransformer,
    settings: AutoregressiveDecoding | None = None,
    *,
    batch: int = 1,
    class_id: Tensor | None = None,
    prompt_id: Tensor | int | None = None,
    condition: Tensor | None = None,
    unconditional_prompt_id: Tensor | int | None = None,
    noise: Tensor | None = None,
    first_step: int = 0,
) -> Tensor:
    """Decode the N tokens of a clip in exactly N passes (2 N with guidance): int64 [B, N].

    Args:
        transformer: in evaluation mode (dropout would draw in every pass).
        batch: how many clips; class_id [B] or condition [B, P] say it where they are given.
        class_id, prompt_id, condition: the prefix, as in AutoregressiveTransformer.forward.
        unconditional_prompt_id: the prompt of guidance's other pass, which has no class but the same
            condition; None: prompt_id.
        noise: Gumbel numbers [B, N, G, V] in place of the seeded draws; a value is
            argmax(logits / temperature + noise).
        first_step: added to the position that keys the random numbers, for further clips.

    Raises:
        ValueError, TypeError: settings or inputs that do not fit; the message names the argument.
    """
    settings = settings or AutoregressiveDecoding()
    config = transformer.config
    for given in (condition, class_id):
        batch = batch if given is None else given.shape[0]
    shape = (batch, config.num_tokens, config.num_subtokens, config.subtoken_size)
    if noise is not None and noise.shape != shape:
        raise ValueError(f"noise: expected {shape}, got {tuple(noise.shape)}")
    device = transformer.position_embedding.device
    prefix = {"class_id": class_id, "prompt_id": prompt_id, "condition": condition}
    free = {**prefix, "class_id": None}
    if unconditional_prompt_id is not None:
        free["prompt_id"] = unconditional_prompt_id
    guide = settings.guidance.scale > 0
    cache, free_cache = (transformer.new_cache() if settings.cached else None for _ in range(2))
    tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64, device=device)
    index = torch.arange(batch * shape[2] * shape[3], device=device).view(batch, 1, *shape[2:])
    for i in range(config.num_tokens):
        # without a cache all tokens so far, and token i itself, which is not looked at
        given = tokens[:, : i + 1] if cache is None else tokens[:, max(0, i - 1) : i]
        logits = transformer(given, **prefix, cache=cache)[:, -1:]  # [B, 1, G, V]
        if guide:  # in every pass, whatever the scale: its cache needs all tokens
            other = transformer(given, **free, cache=free_cache)[:, -1:]
            logits = guided(logits, other, settings.guidance.at((i + 1) / config.num_tokens))
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if settings.temperature > 0:
            values = (
                gumbel(index, first_step + i, VALUE_STREAM, settings.seed)
                if noise is None
                else noise[:, i : i + 1]
            )
            values = cut_noise(values, scores, settings.top_k, settings.top_p)
            scores = scores / settings.temperature + values
        tokens[:, i : i + 1] = pack_subtokens(scores.argmax(-1), config.subtoken_size)
    return tokens
