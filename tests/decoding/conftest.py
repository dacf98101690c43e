"""Pairs of models that are small enough to generate in a blink."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.pairs import make_transformer

from magvit_fast.models import (
    MagvitV2Config,
    MagvitV2Tokenizer,
    MaskedTransformer,
)


@pytest.fixture(scope="module")
def tokenizer() -> MagvitV2Tokenizer:
    torch.manual_seed(0)
    config = MagvitV2Config(
        filters=4,
        channel_multipliers=(1, 1, 2),
        temporal_downsample=(True, True),
        num_res_blocks=1,
        num_bits=6,
    )
    return MagvitV2Tokenizer(config)


@pytest.fixture(scope="module")
def transformer() -> MaskedTransformer:
    return make_transformer()
