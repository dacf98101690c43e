"""The masked transformer of MaskViT: pre-norm layers over windows of a video's tokens.

Source: MaskViT (arXiv 2206.11894), as far as notes on it and the figure of its repository tell;
its code is not public. Its tokenizer is in models/frame_tokenizer.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magvit_fast.models.checkpoint import PretrainedMixin
from magvit_fast.nn.embedding import TokenEmbedding
from magvit_fast.nn.transformer import PreNormLayer, init_transformer_
from magvit_fast.nn.windows import Window, from_windows, to_windows
from magvit_fast.ops._checks import check_tensor

Order = Literal["sw_stw", "stw_sw"]
Attention = Literal["window", "full"]


@dataclass(frozen=True)
class MaskViTConfig:
    """Shape of a MaskViTTransformer. The default is the published base model for 16 frames.

    Attributes:
        frames: most frames of a clip (rows of the temporal position table); shorter clips use the
            first of them.
        grid: (h, w) of a frame's tokens. Published: always 16 x 16.
        codebook_size: ids are in 0 .. codebook_size - 1; a power of two. The paper's is not known;
            1024 is the usual one of a VQ-GAN.
        action_dim: width A of a frame's action; 0 = a model without actions.
        hidden_size, num_heads, mlp_size: of every layer.
        num_blocks: blocks of two layers.
        window: (h, w) of the spatiotemporal window's tile; it spans all frames. Published: 4 x 4 by
            default, 8 x 8 for the best BAIR result, 16 x 16 (the whole grid) as an ablation.
        order: "sw_stw", the spatial window first (the paper's text), or "stw_sw" (the figure).
        attention: "full" gives every layer the whole clip for its window (the paper's ablation).
        dropout: published: 0.
        layer_norm_eps, init_std: not published; a ViT's.
    """

    frames: int = 16
    grid: tuple[int, int] = (16, 16)
    codebook_size: int = 1024
    action_dim: int = 0
    hidden_size: int = 768
    num_blocks: int = 6
    num_heads: int = 4
    mlp_size: int = 3072
    window: tuple[int, int] = (4, 4)
    order: Order = "sw_stw"
    attention: Attention = "window"
    dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("grid", "window"):
            value = tuple(int(n) for n in getattr(self, name))  # JSON has no tuples
            object.__setattr__(self, name, value)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{name}: expected two positive ints (h, w), got {value}")
        for name in ("frames", "hidden_size", "num_blocks", "num_heads", "mlp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.grid[0] % self.window[0] or self.grid[1] % self.window[1]:
            raise ValueError(
                f"window: expected a tile that divides the grid {self.grid}, got {self.window}"
            )
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size: expected a power of two, got {self.codebook_size}")
        if self.action_dim < 0:
            raise ValueError(f"action_dim: expected 0 or more, got {self.action_dim}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_heads}"
            )
        if self.order not in get_args(Order):
            raise ValueError(f"order: expected one of {get_args(Order)}, got {self.order!r}")
        if self.attention not in get_args(Attention):
            raise ValueError(
                f"attention: expected one of {get_args(Attention)}, got {self.attention!r}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a value in [0, 1), got {self.dropout}")

    @property
    def tokens_per_frame(self) -> int:
        return math.prod(self.grid)

    @property
    def num_bits(self) -> int:
        """Bits of a token; equals the tokenizer's num_bits."""
        return self.codebook_size.bit_length() - 1

    def layer_window(self, index: int, frames: int) -> Window:
        """(wt, wh, ww) of layer `index` (two layers a block) for a clip of so many frames."""
        if self.attention == "full":
            return (frames, *self.grid)
        spatial_first = self.order == "sw_stw"
        if (index % 2 == 0) == spatial_first:
            return (1, *self.grid)
        return (frames, *self.window)


class MaskViTTransformer(PretrainedMixin, nn.Module):
    """Predicts the token of every unknown position of a clip from the known ones.

    Bidirectional: nothing is causal. A block is two pre-norm layers, one whose windows are single
    frames (1 x h x w) and one whose windows are tiles through all frames (T x wh x ww); tiles
    neither overlap nor shift. Learned positions: a table over (h, w) plus one over time.

    An action is projected linearly and added to all tokens of its frame (how the paper injects
    actions is not published). Row t of `actions` is the action taken at frame t, which leads to
    frame t + 1. A goal needs no part of its own: the last frame is given as known.

    Output (not published, chosen as in the other masked models here): layer norm, then the product
    with the input table plus a bias per code.

    Parameters: the matrices of a layer hold 12 w**2 weights (MLP = 4 w), so 6 blocks hold 85M at
    w = 768 and 151M at w = 1024.
    """

    config_class = MaskViTConfig
    config: MaskViTConfig

    def __init__(self, config: MaskViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.token_embedding = TokenEmbedding(1, config.codebook_size, dim)
        self.spatial_embedding = nn.Parameter(torch.empty(*config.grid, dim))  # [h, w, D]
        self.temporal_embedding = nn.Parameter(torch.empty(config.frames, dim))  # [T, D]
        self.action_projection = nn.Linear(config.action_dim, dim) if config.action_dim else None
        self.layers = nn.ModuleList(
            PreNormLayer(dim, config.num_heads, config.mlp_size, dropout=config.dropout, eps=eps)
            for _ in range(2 * config.num_blocks)
        )
        self.output_norm = nn.LayerNorm(dim, eps=eps)
        self.output_bias = nn.Parameter(torch.zeros(config.codebook_size))
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices, embeddings: normal of init_std cut at two deviations; biases 0; LN 1, 0."""
        init_transformer_(self, self.config.init_std)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self.gradient_checkpointing = enabled

    def forward(self, ids: Tensor, unknown: Tensor, *, actions: Tensor | None = None) -> Tensor:
        """Logits [B, T, h, w, codebook_size] of every position.

        Args:
            ids: int64 [B, T, h, w], T <= config.frames.
            unknown: bool [B, T, h, w], True = MASK (the id there is not looked at).
            actions: floating [B, T, A]; required exactly when the model has actions.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, an id outside the codebook; the message
                names the argument.
        """
        self._check_inputs(ids, unknown, actions)
        size = (ids.shape[1], ids.shape[2], ids.shape[3])
        x = self.token_embedding(ids.flatten(1), unknown.flatten(1)).view(
            *ids.shape, self.config.hidden_size
        )
        x = x + self.spatial_embedding + self.temporal_embedding[: size[0], None, None]
        if self.action_projection is not None and actions is not None:
            row = self.action_projection(actions.to(self.action_projection.weight.dtype))
            x = x + row[:, :, None, None]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            window = self.config.layer_window(index, size[0])
            tiles = to_windows(x, window)
            tiles = checkpoint(layer, tiles, use_reentrant=False) if recompute else layer(tiles)
            x = from_windows(tiles, size, window)
        return F.linear(self.output_norm(x), self.token_embedding.weight[0], self.output_bias)

    def _check_inputs(self, ids: Tensor, unknown: Tensor, actions: Tensor | None) -> None:
        config = self.config
        check_tensor("ids", ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"ids: expected int64, got {ids.dtype}")
        if ids.dim() != 4 or tuple(ids.shape[2:]) != config.grid:
            raise ValueError(
                f"ids: expected [B, T, {config.grid[0]}, {config.grid[1]}], got {tuple(ids.shape)}"
            )
        if not 1 <= ids.shape[1] <= config.frames:
            raise ValueError(
                f"ids: expected 1 to {config.frames} frames (the model's positions), "
                f"got {ids.shape[1]}"
            )
        check_tensor("unknown", unknown)
        if unknown.shape != ids.shape or unknown.dtype != torch.bool:
            raise ValueError(
                f"unknown: expected bool {tuple(ids.shape)}, "
                f"got {unknown.dtype} {tuple(unknown.shape)}"
            )
        if not config.action_dim:
            if actions is not None:
                raise ValueError("actions: expected None for a model with action_dim 0")
            return
        expected = (ids.shape[0], ids.shape[1], config.action_dim)
        if actions is None:
            raise ValueError(f"actions: expected {expected} for this model, got None")
        check_tensor("actions", actions, floating=True)
        if tuple(actions.shape) != expected:
            raise ValueError(f"actions: expected {expected}, got {tuple(actions.shape)}")
