"""Calm scenes: what moves where, and that later frames can be told from earlier ones."""

from __future__ import annotations

import numpy as np
import pytest

from magvit_fast.data.calm_scenes import calm_motion, calm_scene_class, render_calm_clip
from magvit_fast.data.clips import SceneClips
from magvit_fast.data.order import Draw
from magvit_fast.data.synthetic import FLOOR_COLORS, SCENE_CLASSES

SEEDS = range(40)


def test_a_seed_names_a_clip_and_longer_ones_begin_with_it() -> None:
    clip = render_calm_clip(7)
    assert (clip.shape, clip.dtype) == ((17, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(clip, render_calm_clip(7))
    np.testing.assert_array_equal(render_calm_clip(7, frames=40)[:17], clip)
    assert np.abs(clip.astype(int) - render_calm_clip(8)).mean() > 5


def test_the_same_scene_at_any_size() -> None:
    large = render_calm_clip(5, size=128).astype(np.float64)
    halved = large.reshape(17, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - render_calm_clip(5)).mean() < 1.0


def test_the_disc_keeps_its_speed_and_stays_in_view() -> None:
    bounced = 0
    for seed in SEEDS:
        position = calm_motion(seed, 40)
        assert position.min() >= 13 - 1e-4
        assert position.max() <= 64 - 13 + 1e-4
        steps = np.diff(position, axis=0)
        turns = np.abs(np.diff(steps, axis=0)) > 1e-3
        straight = ~turns.any(axis=1)
        assert straight.sum() > 20
        bounced += int(turns.any())
    assert bounced > 30


def test_five_frames_tell_the_next_one_and_one_does_not() -> None:
    ahead, copied = [], []
    for seed in SEEDS:
        position = calm_motion(seed, 6)
        ahead.append(np.abs(2 * position[4] - position[3] - position[5]).max())
        copied.append(np.abs(position[5] - position[4]).max())
    assert np.median(ahead) < 1e-3
    assert np.median(copied) > 1.0


def test_the_floor_is_the_class() -> None:
    classes = [calm_scene_class(seed) for seed in SEEDS]
    assert set(classes) == set(range(len(SCENE_CLASSES)))
    for seed, floor in zip(SEEDS, classes, strict=True):
        corners = render_calm_clip(seed, 1)[0][[0, 0, -1, -1], [0, -1, 0, -1]] / 255.0
        assert np.abs(corners - FLOOR_COLORS[floor]).max(-1).min() < 0.01


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        render_calm_clip(-1)
    with pytest.raises(ValueError, match="frames must be 1 or more, got 0"):
        render_calm_clip(0, frames=0)


def test_as_a_source_of_clips() -> None:
    source = SceneClips(3, frames=5, size=16, first=4, labels=True, calm=True)
    sample = source[Draw(0, 2)]
    expected = render_calm_clip(6, 5, 16).astype(np.float32).transpose(3, 0, 1, 2) / np.float32(255)
    np.testing.assert_array_equal(sample["video"].numpy(), expected)
    assert sample["class_id"] == calm_scene_class(6)
    assert source.identity != SceneClips(3, frames=5, size=16, first=4, labels=True).identity
