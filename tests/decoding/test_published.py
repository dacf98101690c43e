"""The papers' decoding settings through mf.generate: images in 12 and 64 steps, video in 12, 24, 64."""

from __future__ import annotations

import pytest
import torch

import magvit_fast as mf
from magvit_fast.decoding import Guidance, published
from magvit_fast.decoding.published import PUBLISHED_NAMES
from magvit_fast.models import (
    MagvitV2Config,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)

TINY = {"filters": 4, "num_res_blocks": 1, "num_bits": 6}


def image_tokenizer() -> MagvitV2Tokenizer:
    """32 x 32 pixels -> 16 x 16 tokens."""
    config = MagvitV2Config(
        **TINY, channel_multipliers=(1, 1), temporal_downsample=(False,), frame_by_frame=True
    )
    return MagvitV2Tokenizer(config).eval()


def video_tokenizer() -> MagvitV2Tokenizer:
    """17 x 64 x 64 -> 5 x 16 x 16 tokens."""
    config = MagvitV2Config(**TINY, channel_multipliers=(1, 1, 1), temporal_downsample=(True, True))
    return MagvitV2Tokenizer(config).eval()


def transformer(slots: int) -> MaskedTransformer:
    torch.manual_seed(0)
    return MaskedTransformer(
        MaskedTransformerConfig(
            hidden_size=8, num_layers=1, num_heads=1, mlp_size=8, grid=(slots, 16, 16),
            subtoken_size=8, num_classes=3, init_std=0.5,
        )
    ).eval()  # fmt: skip


def unknown_seen(model: MaskedTransformer, seen: list[tuple[int, bool]]) -> None:
    """Record what every pass saw: how many positions were MASK, and whether it had a class."""
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(
            (int(args[1][0].sum()), kwargs.get("class_id") is not None)
        ),
        with_kwargs=True,
    )


# Of section 8 of the facts for 1280 tokens; by floor(256 cos(pi k / 24)) for 256.
VIDEO_12 = [1269, 1236, 1182, 1108, 1015, 905, 779, 640, 489, 331, 167]
IMAGE_12 = [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33]


@pytest.mark.parametrize("steps", [12, 64])
@pytest.mark.parametrize("name", ["magvit-v2-image-256", "magvit-v2-image-256-guided"])
def test_images(name: str, steps: int) -> None:
    model, seen = transformer(1), []
    unknown_seen(model, seen)
    guided = name.endswith("guided")
    image = mf.generate(
        image_tokenizer(), model, task="class_generation", class_id=[0, 2],
        **published(name, steps=steps),
    )  # fmt: skip
    assert image.shape == (2, 3, 1, 32, 32)
    assert len(seen) == steps * (2 if guided else 1)
    with_class = [count for count, has_class in seen if has_class]
    assert with_class[0] == 256
    if steps == 12:
        assert with_class == [256, *IMAGE_12]
    if guided:
        assert [count for count, has_class in seen if not has_class] == with_class


@pytest.mark.parametrize("steps", [12, 24, 64])
def test_video(steps: int) -> None:
    model, seen = transformer(5), []
    unknown_seen(model, seen)
    settings = published("magvit-v2-video", steps=steps)
    video = mf.generate(video_tokenizer(), model, task="class_generation", class_id=1, **settings)
    assert video.shape == (1, 3, 17, 64, 64)
    assert len(seen) == steps
    counts = [count for count, _ in seen]
    assert counts[0] == 1280
    assert counts == sorted(counts, reverse=True)
    if steps == 12:
        assert counts == [1280, *VIDEO_12]


def test_names_and_changes() -> None:
    assert published("magvit-bair")["choice_temperature"] == 400
    assert published("magvit-v2-video-24")["steps"] == 24
    guidance = published("magvit-v2-image-512-guided")["guidance"]
    assert guidance == Guidance(24.0, "cosine_power", 4.0)
    assert guidance.at(1.0) == pytest.approx(24.0)  # w = 25 in the last step
    assert guidance.at(0.5) == pytest.approx(12 * (1 - 0.98078528))  # (1 - cos(pi / 16)) / 2 of it
    assert published("magvit", steps=3)["steps"] == 3
    for name in PUBLISHED_NAMES:
        published(name)["steps"] = 1  # a copy
    assert published("magvit")["steps"] == 12
    with pytest.raises(ValueError, match=r"name: expected one of magvit, .*, got 'v3'"):
        published("v3")
