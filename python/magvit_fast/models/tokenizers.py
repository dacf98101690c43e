"""Stored tokenizers of any system, by what their files say they are."""

from __future__ import annotations

import os
from typing import Any

from magvit_fast.models.autoencoder import AutoencoderConfig
from magvit_fast.models.checkpoint import load_one_of
from magvit_fast.models.frame_tokenizer import FrameTokenizer
from magvit_fast.models.magvit import MagvitTokenizer
from magvit_fast.models.magvit_v2 import MagvitV2Tokenizer
from magvit_fast.models.presets import PRESETS
from magvit_fast.models.video_tokenizer import VideoTokenizer

__all__ = ["VideoTokenizer", "load_tokenizer", "new_tokenizer", "tokenizer_from_preset"]

_TOKENIZERS: tuple[type[VideoTokenizer], ...] = (
    MagvitTokenizer,
    MagvitV2Tokenizer,
    FrameTokenizer,
)


def new_tokenizer(config: AutoencoderConfig) -> VideoTokenizer:
    """A freshly initialized tokenizer of the system that the config is of."""
    for kind in _TOKENIZERS:
        if type(config) is kind.config_class:
            return kind(config)
    raise TypeError(f"config: expected the config of a tokenizer, got {type(config).__name__}")


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    **options: Any,
) -> VideoTokenizer:
    """A stored tokenizer, whichever class it is of; arguments as `PretrainedMixin.from_pretrained`.

    Raises:
        FileFormatError: as from_pretrained, and for a model that is no tokenizer.
        MissingExtraError: as from_pretrained.
    """
    return load_one_of(_TOKENIZERS, source, revision=revision, subfolder=subfolder, **options)


def tokenizer_from_preset(name: str) -> VideoTokenizer:
    """A fresh tokenizer of the named preset, whichever system it is of.

    Raises:
        ValueError: no system has a tokenizer of that name; the message lists those there are.
    """
    for kind in _TOKENIZERS:
        if name in PRESETS.get(kind.__name__, {}):
            return kind.from_preset(name)
    known = [preset for kind in _TOKENIZERS for preset in PRESETS.get(kind.__name__, {})]
    raise ValueError(f"name: no preset {name!r} of a tokenizer; there are {', '.join(known)}")
