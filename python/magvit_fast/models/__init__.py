"""The models: one file a system."""

from __future__ import annotations

from magvit_fast.models.autoregressive_transformer import AutoregressiveTransformer
from magvit_fast.models.discriminator import Discriminator3D, DiscriminatorConfig
from magvit_fast.models.frame_tokenizer import FrameTokenizer, FrameTokenizerConfig
from magvit_fast.models.magvit import MagvitConfig, MagvitTokenizer
from magvit_fast.models.magvit_v2 import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.models.masked_transformer import (
    MaskedTransformer,
    MaskedTransformerConfig,
    TokenTransformer,
)
from magvit_fast.models.maskvit import MaskViTConfig, MaskViTTransformer
from magvit_fast.models.tokenizers import load_tokenizer
from magvit_fast.models.transformers import VideoTransformer, load_transformer
from magvit_fast.models.video_tokenizer import TokenizerOutput, VideoTokenizer

__all__ = [
    "AutoregressiveTransformer",
    "Discriminator3D",
    "DiscriminatorConfig",
    "FrameTokenizer",
    "FrameTokenizerConfig",
    "MagvitConfig",
    "MagvitTokenizer",
    "MagvitV2Config",
    "MagvitV2Tokenizer",
    "MaskViTConfig",
    "MaskViTTransformer",
    "MaskedTransformer",
    "MaskedTransformerConfig",
    "TokenTransformer",
    "TokenizerOutput",
    "VideoTokenizer",
    "VideoTransformer",
    "load_tokenizer",
    "load_transformer",
]
