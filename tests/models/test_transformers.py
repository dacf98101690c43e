"""Stored transformers are found by what their files say they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magvit_fast.errors import FileFormatError
from magvit_fast.models import (
    AutoregressiveTransformer,
    FrameTokenizer,
    FrameTokenizerConfig,
    MaskedTransformer,
    MaskedTransformerConfig,
    MaskViTConfig,
    MaskViTTransformer,
    load_tokenizer,
    load_transformer,
)

TINY = MaskedTransformerConfig(
    hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, grid=(2, 2, 2), subtoken_size=4
)
WINDOWS = MaskViTConfig(
    frames=2, grid=(2, 2), window=(1, 1), codebook_size=4, hidden_size=8, num_blocks=1,
    num_heads=2, mlp_size=8,
)  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [MaskedTransformer(TINY), AutoregressiveTransformer(TINY), MaskViTTransformer(WINDOWS)],
    ids=lambda model: type(model).__name__,
)
def test_every_kind_comes_back(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    again = load_transformer(tmp_path / "model", dtype=torch.float64)
    assert type(again) is type(model)
    assert again.config == model.config
    assert next(again.parameters()).dtype == torch.float64
    with pytest.raises(FileFormatError, match=f"holds a {type(model).__name__}, expected a Magvit"):
        load_tokenizer(tmp_path / "model")


def test_a_tokenizer_is_no_transformer(tmp_path: Path) -> None:
    config = FrameTokenizerConfig(
        filters=4, channel_multipliers=(1,), num_res_blocks=1, norm_groups=2, codebook_size=4,
        embedding_dim=4,
    )  # fmt: skip
    FrameTokenizer(config).save_pretrained(tmp_path / "model")
    with pytest.raises(
        FileFormatError,
        match=r"holds a FrameTokenizer, expected a MaskedTransformer or Autoregressive.* or MaskViT",
    ):
        load_transformer(tmp_path / "model")
