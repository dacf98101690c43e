"""The masked transformer of MAGVIT and MAGVIT-v2: BERT over [prefix][visual tokens].

The prefix is [task][class] (a single-task model has no [task]), with the prefix condition followed by
[condition tokens][SEP].

Sources: MAGVIT section 3.2 and table 8 (layers, recipe), MAGVIT-v2 section 3.2 (factorized tokens,
one weight-tied head per sub-token).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.nn.embedding import TokenEmbedding
from magvit_fast.nn.transformer import PostNormLayer, init_transformer_
from magvit_fast.ops._checks import check_choice, check_tensor


@dataclass(frozen=True)
class MaskedTransformerConfig:
    """Shape of a MaskedTransformer. The default is MAGVIT-v2's L model for 17x128x128 video.

    grid: (T', H', W') of the tokenizer's ids; their number is the number of visual positions.
    num_subtokens, subtoken_size: G tables of V rows. v2: 2 x 512 (2**18 codes). v1: 1 x 1024.
    num_classes: rows for class labels. One more row, "unconditional", always follows them.
    prompts: names of task rows. Empty: a single-task model, its prefix is [class]; otherwise the
        prefix is [task][class] (the paper's text has it for single-task models too: one name). A
        name is a task's own or the name it shares with others (tasks.Task.prompt).
    condition_tokens: P > 0 puts the tokens of the condition region into the prefix, in place of
        interior conditions: [task][class][P condition tokens][SEP] (MAGVIT's ablation "prefix
        condition", and how an autoregressive model is conditioned). P is the region's size, 256
        for one slot of 16 x 16.
    """

    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_size: int = 4096
    grid: tuple[int, int, int] = (5, 16, 16)
    num_subtokens: int = 2
    subtoken_size: int = 512
    num_classes: int = 0
    prompts: tuple[str, ...] = ()
    condition_tokens: int = 0
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    init_std: float = 0.02

    def __post_init__(self) -> None:
        # JSON has no tuples
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for name in ("hidden_size", "num_layers", "num_heads", "mlp_size", "num_subtokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_heads}"
            )
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid: expected three positive ints (T', H', W'), got {self.grid}")
        if self.subtoken_size < 2 or self.subtoken_size & (self.subtoken_size - 1):
            raise ValueError(f"subtoken_size: expected a power of two, got {self.subtoken_size}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes: expected 0 or more, got {self.num_classes}")
        if not 0 <= self.condition_tokens <= self.num_tokens:
            raise ValueError(
                f"condition_tokens: expected 0 to {self.num_tokens} (grid {self.grid}), "
                f"got {self.condition_tokens}"
            )
        if len(set(self.prompts)) != len(self.prompts):
            raise ValueError(f"prompts: expected distinct names, got {self.prompts}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a value in [0, 1), got {self.dropout}")

    @property
    def num_tokens(self) -> int:
        """Visual positions N."""
        return math.prod(self.grid)

    @property
    def num_bits(self) -> int:
        """Bits of a packed token; equals the tokenizer's num_bits."""
        return self.num_subtokens * (self.subtoken_size.bit_length() - 1)

    @property
    def prefix_length(self) -> int:
        """Positions before the visual ones."""
        condition = self.condition_tokens + 1 if self.condition_tokens else 0  # with SEP
        return (2 if self.prompts else 1) + condition

    @property
    def unconditional_class(self) -> int:
        """The class id that stands for "no class"."""
        return self.num_classes


class MaskedLanguageHead(nn.Module):
    """Dense + GELU + LN, then the product with the (tied) sub-table plus a bias per row."""

    def __init__(self, dim: int, subtoken_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(subtoken_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x [B, N, D], table [V, D] -> logits [B, N, V]."""
        return F.linear(self.norm(F.gelu(self.dense(x), approximate="tanh")), table, self.bias)


class TokenTransformer(PretrainedMixin, nn.Module):
    """What the masked and the autoregressive transformer share: all parameters, prefix and heads.

    Original BERT: post-layer-norm, learned absolute positions (prefix included), embedding sum ->
    LayerNorm -> dropout. The logits cover visual codes alone; class and task rows are inputs only.
    """

    config_class = MaskedTransformerConfig
    config: MaskedTransformerConfig

    def __init__(self, config: MaskedTransformerConfig, *, masked: bool, positions: int) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.token_embedding = TokenEmbedding(
            config.num_subtokens, config.subtoken_size, dim, masked=masked
        )
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last = unconditional
        self.prompt_embedding = nn.Embedding(len(config.prompts), dim) if config.prompts else None
        # SEP. The release's single-task models have no row for it: there it is "unconditional".
        own_row = config.prompts and config.condition_tokens
        self.separator_embedding = nn.Parameter(torch.empty(1, dim)) if own_row else None
        self.position_embedding = nn.Parameter(torch.empty(positions, dim))
        self.embedding_norm = nn.LayerNorm(dim, eps=eps)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(dim, config.num_heads, config.mlp_size, dropout=config.dropout, eps=eps)
            for _ in range(config.num_layers)
        )
        self.heads = nn.ModuleList(
            MaskedLanguageHead(dim, config.subtoken_size, eps) for _ in range(config.num_subtokens)
        )
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices, embeddings: normal of init_std cut at two deviations; biases 0; LN 1, 0."""
        init_transformer_(self, self.config.init_std)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self.gradient_checkpointing = enabled

    def prompt_id(self, *names: str) -> int | None:
        """Row of the first of `names` that is a prompt; None for a single-task model."""
        if not self.config.prompts:
            return None
        for name in names:
            if name in self.config.prompts:
                return self.config.prompts.index(name)
        raise ValueError(
            f"task: expected one of the model's prompts {', '.join(self.config.prompts)}, "
            f"got {' / '.join(names)}"
        )

    def _logits(self, x: Tensor) -> Tensor:
        """[B, n, D] after the layers -> [B, n, G, V]."""
        tables = self.token_embedding.weight
        return torch.stack([head(x, tables[g]) for g, head in enumerate(self.heads)], dim=2)

    def _prefix(
        self,
        tokens: Tensor,
        class_id: Tensor | None,
        prompt_id: Tensor | int | None,
        condition: Tensor | None,
    ) -> Tensor:
        """Embeddings of the prefix, [B, prefix, D]; `tokens` says batch and device."""
        batch = tokens.shape[0]
        if class_id is None:
            class_id = tokens.new_full((batch,), self.config.unconditional_class)
        rows = [self.class_embedding(class_id).unsqueeze(1)]
        if self.prompt_embedding is not None:
            if isinstance(prompt_id, int):
                prompt_id = tokens.new_full((batch,), prompt_id)
            rows.insert(0, self.prompt_embedding(prompt_id).unsqueeze(1))
        if condition is not None:
            own, shared = self.separator_embedding, self.class_embedding.weight[-1:]
            separator = shared if own is None else own
            rows += [self.token_embedding(condition), separator.expand(batch, 1, -1)]
        return torch.cat(rows, dim=1)

    def _check_inputs(
        self,
        tokens: Tensor,
        class_id: Tensor | None,
        prompt_id: Tensor | int | None,
        condition: Tensor | None,
    ) -> None:
        """Raises ValueError and TypeError for what stands before the visual tokens, and their dtype."""
        check_tensor("tokens", tokens)
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: expected int64, got {tokens.dtype}")
        wanted = self.config.condition_tokens
        if (condition is None) != (wanted == 0):
            raise ValueError(
                f"condition: expected {f'{wanted} tokens a sample' if wanted else 'None'} for a "
                f"model with condition_tokens {wanted}, got "
                f"{None if condition is None else tuple(condition.shape)}"
            )
        if condition is not None:
            if condition.shape != (tokens.shape[0], wanted):
                raise ValueError(
                    f"condition: expected [{tokens.shape[0]}, {wanted}], "
                    f"got {tuple(condition.shape)}"
                )
            if condition.dtype != torch.int64:
                raise TypeError(f"condition: expected int64, got {condition.dtype}")
        if class_id is not None and class_id.shape != tokens.shape[:1]:
            raise ValueError(
                f"class_id: expected int64 [{tokens.shape[0]}], got {tuple(class_id.shape)}"
            )
        if class_id is not None:
            if class_id.dtype != torch.int64:
                raise TypeError(f"class_id: expected int64, got {class_id.dtype}")
            self._check_class(class_id)
        if (prompt_id is None) != (self.prompt_embedding is None):
            raise ValueError(
                f"prompt_id: expected {'an id' if self.config.prompts else 'None'} for a model "
                f"with {len(self.config.prompts)} prompts, got {prompt_id!r}"
            )

    def _check_class(self, class_id: Tensor) -> None:
        # on a GPU the look would cost a synchronization at every step: generate() looks there
        if class_id.device.type != "cpu" or torch.compiler.is_compiling() or not class_id.numel():
            return
        if not 0 <= int(class_id.min()) <= int(class_id.max()) <= self.config.num_classes:
            raise ValueError(
                f"class_id: expected ids in 0..{self.config.num_classes}, got {class_id.tolist()}"
            )


class MaskedTransformer(TokenTransformer):
    """Predicts every visual token from a partly masked grid.

    Every position sees every other. Parameters counted (L, two heads, video, 101 classes:
    306,881,536): layers 302,309,376; embedding LayerNorm 2,048; positions (1 + 1,280) x 1,024; two
    sub-tables 2 x 512 x 1,024; rows for 101 classes, unconditional and MASK; two heads of Dense +
    LayerNorm 2 x 1,051,648 and 2 x 512 biases. The tied output matrices are the input tables and
    count once.
    """

    def __init__(self, config: MaskedTransformerConfig) -> None:
        super().__init__(config, masked=True, positions=config.prefix_length + config.num_tokens)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        class_id: Tensor | None = None,
        prompt_id: Tensor | int | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, N, G, V] of every visual position.

        Args:
            tokens: int64 [B, N], packed, in the order t, h, w.
            mask: bool [B, N], True = MASK (the token there is ignored).
            class_id: int64 [B], None = unconditional.
            prompt_id: an int for the whole batch or int64 [B]; required exactly when the model has
                prompts.
            condition: int64 [B, P], the condition tokens of a model with config.condition_tokens = P;
                None for one without.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or (on the CPU) class; the message names the
                argument.
        """
        self._check_inputs(tokens, class_id, prompt_id, condition)
        self._check_grid(tokens, mask)
        prefix = self._prefix(tokens, class_id, prompt_id, condition)
        x = torch.cat([prefix, self.token_embedding(tokens, mask)], 1)
        x = self.embedding_dropout(self.embedding_norm(x + self.position_embedding))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return self._logits(x[:, self.config.prefix_length :])

    def with_grid(
        self, grid: tuple[int, int, int], positions: Literal["corner", "interpolate"] = "corner"
    ) -> MaskedTransformer:
        """The same weights for another grid (T', H', W') of tokens: other sizes and lengths of video.

        Learned positions belong to cells of the trained grid, so what a new grid gets is a choice:

            "corner": the rows of its own cells in the corner at slot 0, top, left. No axis may be
                longer than the model's.
            "interpolate": rows interpolated linearly along t, h and w, the grid's outer edges on
                each other. Any grid; no system was trained this way, so look at the result.

        The new model shares every other parameter with this one (no copy) and is in its mode; what is
        frozen stays frozen. The prefix keeps its rows.

        Raises:
            ValueError: an axis that the corner does not have; another choice; a model with the
                prefix condition, whose number of condition tokens belongs to its grid.
        """
        check_choice("positions", positions, ("corner", "interpolate"))
        config = dataclasses.replace(self.config, grid=grid)
        old, new, first = self.config.grid, config.grid, self.config.prefix_length
        if self.config.condition_tokens:
            raise ValueError(
                "grid: expected a model without the prefix condition, this one has "
                f"{self.config.condition_tokens} condition tokens"
            )
        if positions == "corner" and any(n > o for n, o in zip(new, old, strict=True)):
            raise ValueError(
                f"grid: the model has positions for {old} cells (t, h, w), too few for {new}; "
                'positions="interpolate" makes them'
            )
        weight = self.position_embedding.detach()
        cells = weight[first:].reshape(*old, -1)
        if positions == "corner":
            cells = cells[: new[0], : new[1], : new[2]]
        else:
            volume = cells.permute(3, 0, 1, 2).unsqueeze(0)
            volume = F.interpolate(volume.float(), size=new, mode="trilinear")
            cells = volume[0].permute(1, 2, 3, 0).to(weight.dtype)
        state = dict(self.named_parameters())
        state["position_embedding"] = nn.Parameter(
            torch.cat([weight[:first], cells.reshape(-1, weight.shape[1])]),
            self.position_embedding.requires_grad,
        )
        with torch.device("meta"):
            model = MaskedTransformer(config)
        for name, parameter in model.named_parameters():  # else assigning unfreezes what is shared
            parameter.requires_grad_(state[name].requires_grad)
        model.load_state_dict(state, assign=True)
        model.set_gradient_checkpointing(self.gradient_checkpointing)
        return model.train(self.training)

    def _check_grid(self, tokens: Tensor, mask: Tensor | None) -> None:
        n = self.config.num_tokens
        if tokens.dim() != 2 or tokens.shape[1] != n:
            raise ValueError(
                f"tokens: expected [B, {n}] (grid {self.config.grid}), got {tuple(tokens.shape)}"
            )
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool {tuple(tokens.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
