"""The sampling protocols of the papers, as data, and the clips that they ask for.

A protocol says which task is judged, how many samples are made, which real clips they are compared
with and how the tokens are decoded. Sources: MAGVIT (arXiv 2212.05199) appendix B.3, tables 1 to 3
and its released configs; MaskViT (arXiv 2206.11894) for its BAIR protocol.

A "random" clip is a random window and crop of a random video; a fixed number of clips a video means
uniformly placed windows and crops. Real clips are drawn without replacement, and the conditions and
class labels of the samples come from those same clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from magvit_fast.metrics.best_of import MAGVIT_BEST, MASKVIT_BEST


@dataclass(frozen=True)
class Protocol:
    """How one published figure is measured.

    Attributes:
        name: for the command line.
        data: the data set and its split.
        task: the task that is judged; None for protocols of any task ("--task" chooses).
        frames: length of a clip at stride 1; `given`: leading frames that the model sees (frame
            prediction; None: as the task says).
        size: height and width that clips are cut to and generated at; `metric_size`: that both sides
            are brought to before they are compared (None: the same).
        windows, crops: clips a video, uniformly placed, windows x crops of them; windows 0: random
            clips.
        generated: samples a repeat; repeats: contiguous folds, of which mean and spread are stated.
        trials: samples for each condition clip where that is fixed, else None.
        best: metrics of which a clip's best trial counts (best_of.TrialScores).
        schedule, choice_temperature, steps: masked decoding.
        inception: whether the inception score belongs to it.
        note: what the sources leave open and how it is read here.
    """

    name: str
    data: str
    task: str | None
    size: int
    generated: int
    windows: int = 0
    crops: int = 1
    repeats: int = 4
    frames: int = 16
    given: int | None = None
    metric_size: int | None = None
    trials: int | None = None
    best: frozenset[str] = frozenset()
    schedule: str = "cosine"
    choice_temperature: float = 4.5
    steps: int = 12
    inception: bool = False
    note: str = ""

    @property
    def random_clips(self) -> bool:
        return self.windows == 0


_ALL = (
    Protocol(
        "ucf101-class-generation", "UCF-101, training videos (9.5k)", "class_generation", 128,
        10_000, inception=True,
        note="the classes asked for are those of the sampled real clips",
    ),
    Protocol(
        "bair-standard", "BAIR robot pushing, 256 test videos, camera image_aux1",
        "frame_prediction", 64, 25_600, windows=1, given=1, trials=100, best=MAGVIT_BEST,
        schedule="exp", choice_temperature=400.0,
        note="the first clip of each video, 100 samples of it a repeat",
    ),
    Protocol(
        "bair-debiased", "BAIR robot pushing, 256 test videos, camera image_aux1",
        "frame_prediction", 64, 25_600, windows=15, given=1, best=MAGVIT_BEST,
        note="all 15 windows of 16 in 30 frames on the real side; conditions go round them",
    ),
    Protocol(
        "bair-multitask", "BAIR robot pushing, 256 test videos, camera image_aux1", None, 64,
        25_600, windows=15,
        note="as bair-debiased, for any of the eight tasks without classes",
    ),
    Protocol(
        "bair-maskvit", "BAIR robot pushing, 256 test videos", "frame_prediction", 64, 25_600,
        windows=1, repeats=1, given=1, trials=100, best=MASKVIT_BEST,
        note="best of 100 for all three image metrics, Frechet video distance over all samples; "
        "decoding as in MAGVIT where MaskViT's temperature is not known for this figure",
    ),
    Protocol(
        "k600-frame-prediction", "Kinetics-600, validation videos (29k)", "frame_prediction", 128,
        50_000, windows=2, crops=3, given=5, metric_size=64, schedule="uniform",
        choice_temperature=7.5,
        note="generated at 128, compared at 64 after a center crop and a bilinear resize, for "
        "which no rule is stated: pixel centers with antialiasing here",
    ),
    Protocol(
        "ssv2-class-generation", "Something-Something v2, training videos (169k, 174 classes)",
        "class_generation", 128, 50_000,
    ),
    Protocol(
        "ssv2", "Something-Something v2, validation videos (24k)", None, 128, 50_000, windows=2,
        note="the nine tasks with a condition",
    ),
    Protocol(
        "nuscenes-frame-prediction", "nuScenes, 600 validation videos of 32 frames, front camera",
        "frame_prediction", 128, 50_000, windows=16, crops=3, given=1,
        note="48 clips a video are published, 16 windows x 3 crops of them is our reading",
    ),
    Protocol(
        "objectron-frame-interpolation", "Objectron, 3.6k validation videos",
        "frame_interpolation", 128, 50_000, windows=5,
    ),
    Protocol(
        "web-multitask", "web videos, 26k for evaluation", None, 128, 50_000,
        note="random clips; eight tasks",
    ),
)  # fmt: skip

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({entry.name: entry for entry in _ALL})


def get_protocol(name: str) -> Protocol:
    """The protocol of that name; a ValueError lists the names otherwise."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class ClipRequest:
    """One sample to make: the real clip it is conditioned on, and where it counts.

    clip: number of the real clip (equal numbers: equal clips). video: index of its file.
    start: first frame. place: (vertical, horizontal) position of the crop in its slack, in [0, 1].
    fold: repeat that the sample belongs to. first: whether the real clip is new to its fold.
    """

    clip: int
    video: int
    start: int
    place: tuple[float, float]
    fold: int
    first: bool


def uniform_starts(length: int, span: int, count: int) -> list[int]:
    """First frames of `count` windows of `span` frames, evenly from the beginning to the end.

    One window begins at 0. Fractions are cut, as in the loader that the release uses.

    Raises ValueError when the video is shorter than a window.
    """
    if length < span or count < 1:
        raise ValueError(
            f"length: expected at least {span} frames and one window, got {length} and {count}"
        )
    if count == 1:
        return [0]
    return [(length - span) * i // (count - 1) for i in range(count)]


def uniform_places(count: int) -> list[tuple[float, float]]:
    """Positions of `count` crops along the longer side, from one end to the other; one is central."""
    if count < 1:
        raise ValueError(f"count: expected at least one crop, got {count}")
    shares = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    return [(share, share) for share in shares]


def clip_requests(
    protocol: Protocol,
    lengths: Sequence[int],
    *,
    generated: int | None = None,
    repeats: int | None = None,
    seed: int = 0,
) -> Iterator[ClipRequest]:
    """The samples of a protocol in order: `repeats` folds of `generated` each. O(1) memory a sample.

    Args:
        protocol: which clips.
        lengths: frames of each video; videos shorter than a clip are left out.
        generated, repeats: smaller numbers than the protocol's, for a quick look.
        seed: of the order (fixed numbers of clips) or of the draws (random clips).

    Raises:
        ValueError: numbers below 1, no video long enough.
    """
    generated = protocol.generated if generated is None else generated
    repeats = protocol.repeats if repeats is None else repeats
    if generated < 1 or repeats < 1:
        raise ValueError(f"generated, repeats: expected at least 1, got {(generated, repeats)}")
    usable = [i for i, length in enumerate(lengths) if length >= protocol.frames]
    if not usable:
        raise ValueError(
            f"lengths: none of {len(lengths)} videos has the {protocol.frames} frames of a clip"
        )
    make = _random_requests if protocol.random_clips else _uniform_requests
    return make(protocol, lengths, usable, generated, repeats, seed)


def _random_requests(
    protocol: Protocol,
    lengths: Sequence[int],
    usable: list[int],
    generated: int,
    repeats: int,
    seed: int,
) -> Iterator[ClipRequest]:
    """Every video once before any comes again, each time with another window and crop."""
    order = np.empty(0, dtype=np.int64)
    for number in range(generated * repeats):
        epoch, position = divmod(number, len(usable))
        if position == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(usable))
        video = usable[order[position]]
        rng = np.random.default_rng([seed, 1, number])
        start = int(rng.integers(lengths[video] - protocol.frames + 1))
        place = (float(rng.random()), float(rng.random()))
        yield ClipRequest(number, video, start, place, number // generated, True)


def _uniform_requests(
    protocol: Protocol,
    lengths: Sequence[int],
    usable: list[int],
    generated: int,
    repeats: int,
    seed: int,
) -> Iterator[ClipRequest]:
    """Round and round all windows and crops, in one shuffled order; each fold goes on from the last."""
    per_video = protocol.windows * protocol.crops
    pool = len(usable) * per_video
    order = np.random.default_rng(seed).permutation(pool)
    places = uniform_places(protocol.crops)
    for number in range(generated * repeats):
        clip = int(order[number % pool])
        which, part = divmod(clip, per_video)
        window, crop = divmod(part, protocol.crops)
        video = usable[which]
        start = uniform_starts(lengths[video], protocol.frames, protocol.windows)[window]
        fold, within = divmod(number, generated)
        yield ClipRequest(clip, video, start, places[crop], fold, within < pool)
