"""Large clips: inference takes the finest level through time in pieces, with the results of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.models import MagvitV2Tokenizer, autoencoder
from magvit_fast.models.magvit_v2 import MagvitV2Config
from magvit_fast.nn.stream import in_chunks
from magvit_fast.testing.budgets import assert_equal

# Strided in time at the finest level or not, learned or pooled, one more thing at a time.
CONFIGS: dict[str, dict[str, Any]] = {
    "published": {},
    "time_first": {"temporal_downsample": (True, False)},
    "no_time": {"temporal_downsample": (False, False)},
    "pool": {"resample": "pool", "norm_condition": "statistics"},
    "first_frame_kept": {"temporal_downsample": (True, True), "keep_first_frame": True},
}
FRAMES = (1, 5, 17)


def _tokenizer(**options: Any) -> MagvitV2Tokenizer:
    torch.manual_seed(0)
    layout: dict[str, Any] = {
        "filters": 16, "channel_multipliers": (1, 2, 2), "temporal_downsample": (False, True),
        "num_res_blocks": 1, "num_bits": 6, **options,
    }  # fmt: skip
    tokenizer = MagvitV2Tokenizer(MagvitV2Config(**layout)).eval()
    for parameter in tokenizer.parameters():  # no bias at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    return tokenizer


@torch.no_grad()
def _both(tokenizer: MagvitV2Tokenizer, video: Tensor) -> tuple[Tensor, Tensor]:
    z = tokenizer.encoder(video)
    return z, tokenizer.decoder(z.sign())


def _count_pieces(tokenizer: MagvitV2Tokenizer) -> list[int]:
    """Fills up with the frames of each call of the first convolution."""
    seen: list[int] = []
    tokenizer.encoder.conv_in.register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[2])
    )
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_equal_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer(**CONFIGS[name])
    for frames in FRAMES:
        video = torch.rand(2, 3, frames, 16, 24)
        whole = _both(tokenizer, video)
        seen = _count_pieces(tokenizer)
        with monkeypatch.context() as patched:
            patched.setattr(autoencoder, "PIECES_FROM", 0)
            pieces = _both(tokenizer, video)
        assert seen == ([1] if frames == 1 else [5, *[4] * ((frames - 5) // 4)])
        for part, like in zip(pieces, whole, strict=True):
            torch.testing.assert_close(part, like, rtol=1e-4, atol=1e-5)
            assert part.stride() == like.stride()


def test_ids_and_pixels_of_large_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer()
    video = torch.rand(1, 3, 9, 16, 16)
    ids = tokenizer.encode(video)
    with torch.no_grad():
        pixels = tokenizer.decode(ids)
    monkeypatch.setattr(autoencoder, "PIECES_FROM", 0)
    with torch.inference_mode():
        assert_equal(tokenizer.encode(video), ids)
        torch.testing.assert_close(tokenizer.decode(ids), pixels, rtol=1e-4, atol=1e-5)


def test_only_large_clips_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, video = _tokenizer(), torch.rand(1, 3, 9, 16, 16)
    seen = _count_pieces(tokenizer)
    _both(tokenizer, video)  # small
    monkeypatch.setattr(autoencoder, "PIECES_FROM", 0)
    tokenizer.encoder(video).sum().backward()
    with _native.default_impl("reference"):
        _both(tokenizer, video)
    assert seen == [9, 9, 9]
    norms_of_the_clip = _tokenizer(clip_norms=True)
    seen = _count_pieces(norms_of_the_clip)
    _both(norms_of_the_clip, video)
    assert seen == [9]


def test_frames_must_be_those_of_the_pieces() -> None:
    pieces = [(torch.zeros(1, 1, 2, 1, 1),)] * 2
    assert in_chunks(lambda x, _: x, pieces, 4).shape[2] == 4
    with pytest.raises((ValueError, RuntimeError)):
        in_chunks(lambda x, _: x, pieces, 5)
