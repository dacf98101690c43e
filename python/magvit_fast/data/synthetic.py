"""Synthetic scenes: objects that move, collide and occlude each other under a panning camera.

A scene is a square world, larger than the view, with a softly textured floor. Discs and rounded
boxes move at constant velocity, bounce off the world's walls, and collide elastically with the
objects of their own layer; the objects of the near layer pass over those of the far layer. The
camera pans across the world at constant velocity (it turns back at the world's edge, which it does
not reach in the first 17 frames). Copying a frame is therefore a poor guess of the next ones, while
5 frames are enough to tell how everything will move.

Everything follows from the seed, and a longer clip begins with the frames of the shorter one.
Lengths are in pixels of a 64-pixel view and scale with `size`; time is in frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

# Disjoint ranges of seeds. Models are trained on the first and judged on the second; settings
# (decoding temperatures and the like) are tuned on the third, so that the held-out scores are of
# scenes that nothing was fitted to.
TRAIN_SEEDS = range(10_000_000)
HELD_OUT_SEEDS = range(10_000_000, 10_010_000)
TUNING_SEEDS = range(10_010_000, 10_020_000)
# Of the first 24 held-out scenes, the one nearest to their medians of both scores in demo/demo.json.
DEMO_SEED = 10_000_017

_VIEW = 64.0
_WORLD = 112.0  # side of the world: the camera can pan by _WORLD - _VIEW
_PANNED_FRAMES = 16  # the camera pans this many steps before it may meet the world's edge
_EDGE = 3.0  # width of an object's soft edge: a slightly defocused camera, and no aliasing
_SUBSTEPS = 4  # physics steps a frame: an object moves less than 1 px between collision tests

# Vivid object colors and calm floor colors (RGB in [0, 1]), all easy to tell apart.
OBJECT_COLORS = np.array(
    [
        [0.86, 0.28, 0.24],
        [0.90, 0.74, 0.26],
        [0.28, 0.78, 0.38],
        [0.88, 0.88, 0.86],
        [0.90, 0.52, 0.16],
        [0.24, 0.74, 0.86],
        [0.86, 0.44, 0.70],
        [0.12, 0.12, 0.14],
    ],
    dtype=np.float32,
)
FLOOR_COLORS = np.array(
    [[0.20, 0.28, 0.45], [0.38, 0.26, 0.40], [0.22, 0.38, 0.36], [0.42, 0.36, 0.30]],
    dtype=np.float32,
)
# A scene's class is the color of its floor; in the order of FLOOR_COLORS.
SCENE_CLASSES = ("blue floor", "purple floor", "green floor", "brown floor")


@dataclass(frozen=True)
class Motion:
    """Where everything is, frame by frame, in world pixels of a 64-pixel view.

    camera [T, 2] is the view's top left corner and positions [T, N, 2] the objects' centers, both
    as (x, y); radii [N] are those of the collision circles; layers [N] is 0 (far) or 1 (near),
    ascending; collisions counts the meetings of two objects and bounces those with a wall.
    """

    camera: FloatArray
    positions: FloatArray
    radii: FloatArray
    layers: npt.NDArray[np.int64]
    collisions: int
    bounces: int


@dataclass(frozen=True)
class _Looks:
    """Colors [N, 3], box [N] (False: disc), angles, aspects [N], floor (row of FLOOR_COLORS), waves,
    tints [K, 3]."""

    colors: FloatArray
    box: npt.NDArray[np.bool_]
    angles: FloatArray
    aspects: FloatArray
    floor: int
    waves: FloatArray  # rows: x frequency, y frequency (radians a pixel), phase
    tints: FloatArray


def scene_motion(seed: int, frames: int = 17) -> Motion:
    """The motion of scene `seed` over `frames` frames. `render_clip` draws it."""
    _check_counts(frames=frames)
    rng = np.random.default_rng([seed, 0])
    camera, pan = _camera_path(rng, frames)
    count = int(rng.integers(3, 5))
    layers = np.sort(np.concatenate([[0, 0, 1], rng.integers(0, 2, size=count - 3)])).astype(
        np.int64
    )
    radii = rng.uniform(8.0, 12.5, size=count)
    start, velocity = _place_objects(rng, radii, layers, camera[0], pan)
    return _simulate(camera, start, velocity, radii, layers, frames)


def _camera_path(
    rng: np.random.Generator, frames: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Camera corner [T, 2] and its velocity [2] in the first frames."""
    heading = rng.uniform(0.0, 2.0 * np.pi)
    pan = rng.uniform(1.2, 2.3) * np.array([np.cos(heading), np.sin(heading)])
    free = _WORLD - _VIEW
    reach = pan * _PANNED_FRAMES
    low = np.maximum(0.0, -reach)
    start = low + rng.uniform(0.0, 1.0, size=2) * (free - np.abs(reach))
    path = start + np.arange(frames)[:, None] * pan
    # A triangle wave: beyond the world's edge the camera pans back.
    return free - np.abs(np.mod(path, 2.0 * free) - free), pan


def _place_objects(
    rng: np.random.Generator,
    radii: npt.NDArray[np.float64],
    layers: npt.NDArray[np.int64],
    camera: npt.NDArray[np.float64],
    pan: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centers and velocities [N, 2] at frame 0: in the first view, apart within a layer."""
    positions = np.zeros((len(radii), 2))
    velocities = np.zeros((len(radii), 2))
    for i, radius in enumerate(radii):
        mates = np.flatnonzero(layers[:i] == layers[i])
        for _ in range(200):
            positions[i] = np.clip(camera + rng.uniform(4.0, 60.0, size=2), radius, _WORLD - radius)
            gaps = np.hypot(*(positions[mates] - positions[i]).T) - radii[mates] - radius
            if gaps.size == 0 or gaps.min() > 1.0:
                break
        heading = rng.uniform(0.0, 2.0 * np.pi)
        speed = rng.uniform(1.0, 2.6)
        # With half of the camera's motion, objects cross the view but tend to stay in sight.
        velocities[i] = speed * np.array([np.cos(heading), np.sin(heading)]) + 0.5 * pan
    return positions, velocities


def _simulate(
    camera: npt.NDArray[np.float64],
    positions: npt.NDArray[np.float64],
    velocities: npt.NDArray[np.float64],
    radii: npt.NDArray[np.float64],
    layers: npt.NDArray[np.int64],
    frames: int,
) -> Motion:
    count = len(radii)
    pairs = [(i, j) for j in range(count) for i in range(j) if layers[i] == layers[j]]
    track = np.zeros((frames, count, 2))
    collisions = bounces = 0
    limit = _WORLD - radii[:, None]
    for frame in range(frames):
        track[frame] = positions
        for _ in range(_SUBSTEPS):
            positions = positions + velocities / _SUBSTEPS
            outward = ((positions < radii[:, None]) & (velocities < 0)) | (
                (positions > limit) & (velocities > 0)
            )
            velocities = np.where(outward, -velocities, velocities)
            bounces += int(outward.sum())
            for i, j in pairs:
                collisions += _collide(i, j, positions, velocities, radii)
    return Motion(
        camera=camera.astype(np.float32),
        positions=track.astype(np.float32),
        radii=radii.astype(np.float32),
        layers=layers,
        collisions=collisions,
        bounces=bounces,
    )


def _collide(
    i: int,
    j: int,
    positions: npt.NDArray[np.float64],
    velocities: npt.NDArray[np.float64],
    radii: npt.NDArray[np.float64],
) -> bool:
    """Elastic collision of discs whose masses go with their areas; changes `velocities`."""
    apart = positions[j] - positions[i]
    distance = float(np.hypot(apart[0], apart[1]))
    if distance >= radii[i] + radii[j] or distance == 0.0:
        return False
    normal = apart / distance
    closing = float((velocities[i] - velocities[j]) @ normal)
    if closing <= 0.0:  # already parting
        return False
    mass_i, mass_j = radii[i] ** 2, radii[j] ** 2
    impulse = 2.0 * closing / (mass_i + mass_j)
    velocities[i] -= impulse * mass_j * normal
    velocities[j] += impulse * mass_i * normal
    return True


def _scene_looks(seed: int, count: int) -> _Looks:
    rng = np.random.default_rng([seed, 1])
    waves = 3
    heading = rng.uniform(0.0, np.pi, size=waves)
    frequency = 2.0 * np.pi / rng.uniform(36.0, 80.0, size=waves)
    columns = [
        frequency * np.cos(heading),
        frequency * np.sin(heading),
        rng.uniform(0, 2 * np.pi, waves),
    ]
    # One tint for all channels plus a little of each: bands of light rather than a rainbow.
    tints = rng.uniform(0.05, 0.10, size=(waves, 1)) + rng.uniform(-0.03, 0.03, size=(waves, 3))
    box = rng.random(count) < 0.5
    return _Looks(
        colors=OBJECT_COLORS[rng.permutation(len(OBJECT_COLORS))[:count]],
        box=box,
        angles=rng.uniform(0.0, np.pi, size=count).astype(np.float32),
        aspects=rng.uniform(0.7, 1.0, size=count).astype(np.float32),
        floor=int(rng.integers(len(FLOOR_COLORS))),
        waves=np.stack(columns, axis=1).astype(np.float32),
        tints=tints.astype(np.float32),
    )


def scene_class(seed: int) -> int:
    """The class of scene `seed`: an index of SCENE_CLASSES, the same at any length and size."""
    return _scene_looks(seed, len(scene_motion(seed, 1).radii)).floor


def render_clip(seed: int, frames: int = 17, size: int = 64) -> UInt8Array:
    """Render scene `seed`.

    Args:
        seed: names the scene; see TRAIN_SEEDS, HELD_OUT_SEEDS and TUNING_SEEDS.
        frames: number of frames T.
        size: height and width in pixels. The same scene is drawn at any size.

    Returns:
        uint8 [T, size, size, 3], RGB.

    Raises:
        ValueError: seed is negative, or frames or size is below 1.
    """
    check_clip(seed, frames, size)
    motion = scene_motion(seed, frames)
    looks = _scene_looks(seed, len(motion.radii))
    pixel = _VIEW / size
    grid = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(pixel)
    x = motion.camera[:, 0, None] + grid  # [T, W] world coordinates of the pixels' centers
    y = motion.camera[:, 1, None] + grid  # [T, H]
    picture = _draw_floor(x, y, looks)
    for index in range(len(motion.radii)):  # far layer first
        _draw_object(picture, x, y, motion, looks, index)
    return np.asarray(np.clip(picture * 255.0 + 0.5, 0.0, 255.0), dtype=np.uint8).transpose(
        0, 2, 3, 1
    )


def _draw_floor(x: FloatArray, y: FloatArray, looks: _Looks) -> FloatArray:
    """Sum of plane waves [T, 3, H, W]; cos(a + b) is built from the axes, with no cosine a pixel."""
    wx = x[:, None, :] * looks.waves[None, :, 0, None] + looks.waves[None, :, 2, None]  # [T, K, W]
    wy = y[:, None, :] * looks.waves[None, :, 1, None]  # [T, K, H]
    down = np.concatenate([np.cos(wy), -np.sin(wy)], axis=1)  # [T, 2K, H]
    across = np.concatenate([np.cos(wx), np.sin(wx)], axis=1)  # [T, 2K, W]
    tints = np.concatenate([looks.tints, looks.tints])  # [2K, 3]
    weighted = tints.T[None, :, None, :] * down.transpose(0, 2, 1)[:, None]  # [T, 3, H, 2K]
    return np.asarray(
        weighted @ across[:, None] + FLOOR_COLORS[looks.floor][None, :, None, None],
        dtype=np.float32,
    )


def _draw_object(
    picture: FloatArray,
    x: FloatArray,
    y: FloatArray,
    motion: Motion,
    looks: _Looks,
    index: int,
) -> None:
    """Blend one object over picture [T, 3, H, W], in place, with a soft edge."""
    radius = motion.radii[index]
    dx = (x - motion.positions[:, index, 0, None])[:, None, :]  # [T, 1, W]
    dy = (y - motion.positions[:, index, 1, None])[:, :, None]  # [T, H, 1]
    if looks.box[index]:
        cos, sin = np.cos(looks.angles[index]), np.sin(looks.angles[index])
        corner = 0.35 * radius
        half = np.float32(0.9) * radius - corner  # of the inner box, which the corner radius grows
        u = np.abs(cos * dx + sin * dy) - half
        v = np.abs(cos * dy - sin * dx) - half * looks.aspects[index]
        outside = np.sqrt(np.square(np.maximum(u, 0)) + np.square(np.maximum(v, 0)))
        distance = outside + np.minimum(np.maximum(u, v), 0) - corner
    else:
        distance = np.sqrt(dx * dx + dy * dy) - radius
    ramp = np.clip(np.float32(0.5) - distance / np.float32(_EDGE), 0.0, 1.0)
    alpha = ramp * ramp * (3.0 - 2.0 * ramp)
    # Lit from the upper left.
    light = np.float32(0.92) - np.clip(dx + dy, -20.0, 20.0) * np.float32(0.12 / 20.0)
    for channel, value in enumerate(looks.colors[index]):
        plane = picture[:, channel]
        plane += alpha * (value * light - plane)


def check_clip(seed: int, frames: int, size: int) -> None:
    """Raise the ValueError of `render_clip` for what no scene has."""
    _check_counts(frames=frames, size=size)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")


def demo_clip(frames: int = 33, size: int = 64) -> UInt8Array:
    """The demo's held-out scene, uint8 [T, size, size, 3]."""
    return render_clip(DEMO_SEED, frames, size)
