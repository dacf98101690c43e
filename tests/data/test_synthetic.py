"""The synthetic scenes: deterministic, ample motion, collisions and occlusions."""

from __future__ import annotations

import numpy as np
import pytest

from magvit_fast.data.synthetic import (
    DEMO_SEED,
    HELD_OUT_SEEDS,
    TRAIN_SEEDS,
    TUNING_SEEDS,
    demo_clip,
    render_clip,
    scene_motion,
)

SEEDS = TRAIN_SEEDS[:60]


def _visible_overlap(seed: int) -> bool:
    """Whether a near object covers part of a far one inside the view in some frame."""
    motion = scene_motion(seed)
    for near in np.flatnonzero(motion.layers == 1):
        for far in np.flatnonzero(motion.layers == 0):
            gap = np.hypot(*(motion.positions[:, near] - motion.positions[:, far]).T)
            middle = (motion.positions[:, near] + motion.positions[:, far]) / 2 - motion.camera
            inside = ((middle > 0) & (middle < 64)).all(axis=1)
            if (inside & (gap < 0.6 * (motion.radii[near] + motion.radii[far]))).any():
                return True
    return False


def test_same_seed_same_clip_and_other_seed_other_clip() -> None:
    first = render_clip(7)
    assert first.shape == (17, 64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render_clip(7))
    assert np.abs(first.astype(int) - render_clip(8).astype(int)).mean() > 5


def test_longer_clip_begins_with_the_shorter_one() -> None:
    np.testing.assert_array_equal(render_clip(3, frames=40)[:5], render_clip(3, frames=5))


def test_size_scales_the_same_scene() -> None:
    large = render_clip(5, size=128).astype(np.float64)
    halved = large.reshape(17, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - render_clip(5)).mean() < 1.0


def test_seed_ranges_are_disjoint_and_hold_the_demo() -> None:
    ranges = [TRAIN_SEEDS, HELD_OUT_SEEDS, TUNING_SEEDS]
    for i, a in enumerate(ranges):
        for b in ranges[i + 1 :]:
            assert a.stop <= b.start or b.stop <= a.start
    assert DEMO_SEED in HELD_OUT_SEEDS
    np.testing.assert_array_equal(demo_clip(frames=17), render_clip(DEMO_SEED))
    assert demo_clip().shape[0] >= 17


def test_copying_the_last_given_frame_is_a_poor_guess() -> None:
    scores = []
    for seed in SEEDS:
        clip = render_clip(seed).astype(np.float64) / 255
        error = np.mean((clip[5:] - clip[4]) ** 2)
        scores.append(-10 * np.log10(error))
    assert 12.0 < np.mean(scores) < 16.5
    assert np.quantile(scores, 0.9) < 18.0


def test_objects_move_at_constant_velocity_between_meetings() -> None:
    calm = [
        motion
        for motion in map(scene_motion, SEEDS)
        if motion.collisions == 0 and motion.bounces == 0
    ]
    assert calm
    for motion in calm:
        for track in (motion.camera[:, None], motion.positions):
            step = np.diff(track, axis=0)
            np.testing.assert_allclose(step, np.broadcast_to(step[:1], step.shape), atol=1e-3)


def test_camera_pans_and_stays_inside_the_world() -> None:
    for seed in SEEDS:
        camera = scene_motion(seed, frames=100).camera
        assert camera.min() >= 0
        assert camera.max() + 64 <= 112
        speed = np.linalg.norm(np.diff(camera[:17], axis=0), axis=1)
        assert speed.min() > 1.1
        assert speed.max() < 2.4


def test_collisions_bounces_and_occlusions_happen() -> None:
    motions = [scene_motion(seed) for seed in SEEDS]
    assert np.mean([motion.collisions > 0 for motion in motions]) > 0.15
    assert np.mean([motion.bounces > 0 for motion in motions]) > 0.15
    assert np.mean([_visible_overlap(seed) for seed in SEEDS]) > 0.4


def test_collision_keeps_momentum_and_energy() -> None:
    checked = 0
    for seed in TRAIN_SEEDS[:400]:
        motion = scene_motion(seed)
        if motion.collisions != 1 or motion.bounces:
            continue
        mass = motion.radii.astype(np.float64) ** 2
        steps = np.diff(motion.positions, axis=0)
        before, after = steps[0], steps[-1]
        moved = np.abs(after - before).max(axis=1) > 1e-3
        at_an_end = max(np.abs(steps[1] - before).max(), np.abs(steps[-2] - after).max()) > 1e-3
        if moved.sum() != 2 or at_an_end:
            continue
        np.testing.assert_allclose(mass @ before, mass @ after, rtol=1e-3, atol=0.5)
        energy = [mass @ np.sum(v.astype(np.float64) ** 2, axis=1) for v in (before, after)]
        assert energy[0] == pytest.approx(energy[1], rel=1e-3)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize(
    ("arguments", "name"), [((-1,), "seed"), ((0, 0), "frames"), ((0, 5, 0), "size")]
)
def test_bad_arguments_are_named(arguments: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        render_clip(*arguments)
