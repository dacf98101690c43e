"""The autoregressive baseline: MAGVIT's transformer under a causal mask, one token after another.

Source: MAGVIT, table 6 (the same tokens decoded in 1,024 steps in place of 12). Layers, sizes, prefix
and output heads are those of the masked transformer; what is given stands in the prefix, since a
causal model sees nothing behind the token that it makes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from magvit_fast.models.masked_transformer import MaskedTransformerConfig, TokenTransformer
from magvit_fast.nn.attention import KeyValueCache


class AutoregressiveTransformer(TokenTransformer):
    """Predicts every visual token from the prefix and the tokens before it (order t, h, w).

    Presets and config are those of MaskedTransformer. It has no MASK vector and one position fewer
    (the last token is nobody's input); with num_subtokens > 1 the sub-tokens of one token are drawn
    independently of each other, as in masked decoding.
    """

    def __init__(self, config: MaskedTransformerConfig) -> None:
        positions = config.prefix_length + config.num_tokens - 1
        super().__init__(config, masked=False, positions=positions)

    def forward(
        self,
        tokens: Tensor,
        *,
        class_id: Tensor | None = None,
        prompt_id: Tensor | int | None = None,
        condition: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits [B, n, G, V]; row i belongs to the token after those given up to then.

        Args:
            tokens: int64 [B, n], packed. Without a cache: the first 1 <= n <= N tokens of a clip, and
                row i of the logits is that of token i, made from tokens 0..i-1 (so the last one given is
                not looked at). With a cache: the tokens that come after those it holds, and row i is
                that of the token that follows the i-th of them.
            class_id, prompt_id, condition: as in MaskedTransformer.forward.
            cache: from `new_cache`. The first call holds the prefix too, and takes n = 0 tokens for
                the logits of token 0 (one row).

        Raises:
            TypeError, ValueError: a wrong dtype, shape or (on the CPU) class, or more tokens than a
                clip has; the message names the argument.
        """
        self._check_inputs(tokens, class_id, prompt_id, condition)
        start = 0 if cache is None else cache[0].length
        begins = start == 0
        if tokens.dim() != 2 or (tokens.shape[1] == 0 and not (begins and cache is not None)):
            raise ValueError(f"tokens: expected [B, n] with n >= 1, got {tuple(tokens.shape)}")
        inputs = tokens if cache is not None else tokens[:, :-1]
        self._check_length(tokens, start + inputs.shape[1] + begins * self.config.prefix_length)
        rows = [self.token_embedding(inputs)]
        if begins:
            rows.insert(0, self._prefix(tokens, class_id, prompt_id, condition))
        x = torch.cat(rows, 1)
        positions = self.position_embedding[start : start + x.shape[1]]
        x = self.embedding_dropout(self.embedding_norm(x + positions))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for i, layer in enumerate(self.layers):
            if recompute:
                x = checkpoint(layer, x, use_reentrant=False, causal=True)
            else:
                x = layer(x, causal=True, cache=None if cache is None else cache[i])
        return self._logits(x[:, self.config.prefix_length - 1 :] if begins else x)

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache, one part a layer, with room for a whole clip.

        It takes 2 * layers * positions * hidden_size numbers a sample: 38 MB for B and 101 MB for L
        with 1,025 positions in bfloat16.
        """
        return [KeyValueCache(self.position_embedding.shape[0]) for _ in self.layers]

    def _check_length(self, tokens: Tensor, end: int) -> None:
        most, inputs = self.config.num_tokens - 1, end - self.config.prefix_length
        if inputs > most:
            raise ValueError(
                f"tokens: expected at most {most} inputs (grid {self.config.grid}; its last token is "
                f"never one), got {tuple(tokens.shape)}, which makes {inputs}"
            )
