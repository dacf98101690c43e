"""Calm scenes: a yellow disc at constant velocity over a floor of one color, seen by a fixed camera.

The little sister of synthetic.py for models that learn within a minute: little to see, and all of it
predictable. The disc bounces off the view's edges. Where it goes cannot be told from one frame but from
a few; a copied frame is a poor guess of later ones.

Everything follows from the seed, and a longer clip begins with the frames of the shorter one. Lengths
are in pixels of a 64-pixel view and scale with `size`; time is in frames. Seeds are split into the
ranges of synthetic.py, whose four floors are the classes here too.
"""

from __future__ import annotations

import numpy as np

from magvit_fast.data.synthetic import (
    FLOOR_COLORS,
    OBJECT_COLORS,
    FloatArray,
    UInt8Array,
    check_clip,
)

_VIEW = 64.0
_EDGE = 5.0  # width of the disc's soft edge: over a pixel at 16 x 16, so that motion below a pixel shows
_RADIUS = 13.0
_SPEEDS = (1.5, 3.0)  # pixels a frame
_COLOR = OBJECT_COLORS[1]


def calm_motion(seed: int, frames: int = 17) -> FloatArray:
    """The disc's center as (x, y) in scene `seed`: [T, 2]. `render_calm_clip` draws it."""
    rng = np.random.default_rng([seed, 2])
    free = _VIEW - 2 * _RADIUS
    start = rng.uniform(0.0, free, size=2)
    heading = rng.uniform(0.0, 2.0 * np.pi)
    velocity = rng.uniform(*_SPEEDS) * np.array([np.cos(heading), np.sin(heading)])
    path = start + np.arange(frames)[:, None] * velocity
    # A triangle wave: at the edge the disc turns back.
    inside = free - np.abs(np.mod(path, 2.0 * free) - free)
    return (inside + _RADIUS).astype(np.float32)


def calm_scene_class(seed: int) -> int:
    """The class of scene `seed`: the color of its floor, an index of synthetic.SCENE_CLASSES."""
    return int(np.random.default_rng([seed, 3]).integers(len(FLOOR_COLORS)))


def render_calm_clip(seed: int, frames: int = 17, size: int = 64) -> UInt8Array:
    """Render scene `seed` as uint8 [T, size, size, 3], RGB.

    Raises ValueError: seed is negative, or frames or size is below 1.
    """
    check_clip(seed, frames, size)
    position = calm_motion(seed, frames)
    floor = FLOOR_COLORS[calm_scene_class(seed)]
    grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(_VIEW / size)
    dx = (grid - position[:, 0, None])[:, None, :]  # [T, 1, W]
    dy = (grid - position[:, 1, None])[:, :, None]  # [T, H, 1]
    distance = np.sqrt(dx * dx + dy * dy) - np.float32(_RADIUS)
    ramp = np.clip(np.float32(0.5) - distance / np.float32(_EDGE), 0.0, 1.0)
    alpha = (ramp * ramp * (3.0 - 2.0 * ramp))[..., None]  # [T, H, W, 1]
    picture = floor + alpha * (_COLOR - floor)
    return np.asarray(picture * 255.0 + 0.5, dtype=np.uint8)
