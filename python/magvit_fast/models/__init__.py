"""The models: one file a system."""

from magvit_fast.models.magvit_v2 import MagvitV2Config, MagvitV2Tokenizer, TokenizerOutput

__all__ = ["MagvitV2Config", "MagvitV2Tokenizer", "TokenizerOutput"]
