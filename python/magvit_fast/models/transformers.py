"""Stored transformers of any system, by what their files say they are."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from magvit_fast.models.autoregressive_transformer import AutoregressiveTransformer
from magvit_fast.models.checkpoint import PretrainedMixin, load_one_of
from magvit_fast.models.masked_transformer import MaskedTransformer, TokenTransformer
from magvit_fast.models.maskvit import MaskViTTransformer

VideoTransformer: TypeAlias = TokenTransformer | MaskViTTransformer

_TRANSFORMERS: tuple[type[PretrainedMixin], ...] = (
    MaskedTransformer,
    AutoregressiveTransformer,
    MaskViTTransformer,
)


def load_transformer(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    **options: Any,
) -> VideoTransformer:
    """A stored transformer, whichever class it is of; arguments as `PretrainedMixin.from_pretrained`.

    Raises:
        FileFormatError: as from_pretrained, and for a model that is no transformer.
        MissingExtraError: as from_pretrained.
    """
    model = load_one_of(_TRANSFORMERS, source, revision=revision, subfolder=subfolder, **options)
    assert isinstance(model, (TokenTransformer, MaskViTTransformer))
    return model
