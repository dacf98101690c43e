"""The two training stages: tokenizer and discriminator, then the masked transformer.

    result = train_tokenizer(load_recipe("recipes/tiny-tokenizer.toml", TokenizerTraining))

Several processes: start the same program with `accelerate launch` or `torchrun`.
"""

from __future__ import annotations

from magvit_fast.training.config import TokenizerTraining, TransformerTraining, load_recipe
from magvit_fast.training.maskvit_config import MaskViTTraining, load_transformer_recipe
from magvit_fast.training.run import TrainingResult
from magvit_fast.training.tokenizer_loop import train_tokenizer
from magvit_fast.training.transformer_loop import train_transformer

__all__ = [
    "MaskViTTraining",
    "TokenizerTraining",
    "TrainingResult",
    "TransformerTraining",
    "load_recipe",
    "load_transformer_recipe",
    "train_tokenizer",
    "train_transformer",
]
