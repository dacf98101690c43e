"""Protocols against the published numbers, and the clips that they ask for."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magvit_fast.decoding.schedules import unknown_counts
from magvit_fast.metrics import PROTOCOLS, clip_requests, get_protocol
from magvit_fast.metrics.protocols import uniform_places, uniform_starts
from magvit_fast.tasks import TASKS


def test_published_numbers() -> None:
    """MAGVIT, appendix B.3 and the released configs."""
    rows = {
        name: (p.generated, p.repeats, p.windows * p.crops, p.size, p.metric_size)
        for name, p in PROTOCOLS.items()
    }
    assert rows["ucf101-class-generation"] == (10_000, 4, 0, 128, None)
    assert rows["bair-standard"] == (256 * 100, 4, 1, 64, None)
    assert rows["bair-debiased"] == (25_600, 4, 15, 64, None)
    assert rows["k600-frame-prediction"] == (50_000, 4, 6, 128, 64)
    assert rows["ssv2"] == (50_000, 4, 2, 128, None)
    assert rows["nuscenes-frame-prediction"][2] == 48
    assert rows["objectron-frame-interpolation"][2] == 5
    decoding = {name: (p.schedule, p.choice_temperature) for name, p in PROTOCOLS.items()}
    assert decoding["bair-standard"] == ("exp", 400.0)
    assert decoding["k600-frame-prediction"] == ("uniform", 7.5)
    assert set(decoding.values()) == {("exp", 400.0), ("uniform", 7.5), ("cosine", 4.5)}
    assert PROTOCOLS["k600-frame-prediction"].given == 5
    assert {p.steps for p in PROTOCOLS.values()} == {12}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_entries_name_what_exists(name: str) -> None:
    protocol = get_protocol(name)
    assert protocol.name == name
    assert protocol.task is None or protocol.task in TASKS
    assert unknown_counts(protocol.schedule, 1024, protocol.steps)[-1] <= 1
    assert protocol.data


def test_unknown_protocol() -> None:
    with pytest.raises(ValueError, match=r"protocol: expected one of .*bair-standard.* got 'bair'"):
        get_protocol("bair")


def test_the_debiased_windows_are_all_there_are() -> None:
    assert uniform_starts(30, 16, 15) == list(range(15))
    assert uniform_starts(30, 16, 1) == [0]
    assert uniform_starts(101, 16, 2) == [0, 85]
    assert uniform_starts(21, 16, 3) == [0, 2, 5]  # fractions are cut
    assert uniform_starts(16, 16, 4) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="at least 16 frames"):
        uniform_starts(15, 16, 1)


def test_crops_go_from_end_to_end() -> None:
    assert uniform_places(3) == [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]
    assert uniform_places(1) == [(0.5, 0.5)]
    with pytest.raises(ValueError, match="at least one crop"):
        uniform_places(0)


def test_bair_standard_makes_100_of_each_first_clip() -> None:
    protocol = PROTOCOLS["bair-standard"]
    requests = list(clip_requests(protocol, [30] * 256, repeats=2))
    assert len(requests) == 51_200
    assert {r.start for r in requests} == {0}
    for fold in (0, 1):
        mine = [r for r in requests if r.fold == fold]
        assert set(Counter(r.clip for r in mine).values()) == {100}
        assert sum(r.first for r in mine) == 256
        assert {r.clip for r in mine if r.first} == set(range(256))


def test_bair_debiased_compares_with_3840_clips() -> None:
    requests = list(clip_requests(PROTOCOLS["bair-debiased"], [30] * 256, repeats=1))
    assert len(requests) == 25_600
    real = [(r.video, r.start) for r in requests if r.first]
    assert len(real) == len(set(real)) == 3_840
    assert {start for _, start in real} == set(range(15))


def test_k600_clips_are_two_windows_of_three_crops() -> None:
    requests = list(clip_requests(PROTOCOLS["k600-frame-prediction"], [300, 40], generated=12, repeats=1))  # fmt: skip
    seen = {(r.video, r.start, r.place[0]) for r in requests}
    assert seen == {
        (video, start, place)
        for video, last in ((0, 284), (1, 24))
        for start in (0, last)
        for place in (0.0, 0.5, 1.0)
    }
    assert all(r.first for r in requests)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda n: max(n) >= 16),
    generated=st.integers(1, 30),
    repeats=st.integers(1, 3),
    name=st.sampled_from(sorted(PROTOCOLS)),
    seed=st.integers(0, 5),
)
def test_requests_hold_their_promises(
    lengths: list[int], generated: int, repeats: int, name: str, seed: int
) -> None:
    protocol = PROTOCOLS[name]
    options = {"generated": generated, "repeats": repeats, "seed": seed}
    requests = list(clip_requests(protocol, lengths, **options))
    assert requests == list(clip_requests(protocol, lengths, **options))
    assert [r.fold for r in requests] == [i // generated for i in range(generated * repeats)]
    for r in requests:
        assert 0 <= r.start <= lengths[r.video] - protocol.frames
        assert all(0 <= share <= 1 for share in r.place)
    for fold in range(repeats):  # without replacement, and every clip is new exactly once
        mine = [r for r in requests if r.fold == fold]
        assert [r.clip for r in mine if r.first] == list(dict.fromkeys(r.clip for r in mine))
    where = {r.clip: (r.video, r.start, r.place) for r in requests}
    assert all(where[r.clip] == (r.video, r.start, r.place) for r in requests)


def test_random_clips_use_every_video_before_any_again() -> None:
    protocol = PROTOCOLS["ucf101-class-generation"]
    requests = list(clip_requests(protocol, [50] * 10, generated=25, repeats=1))
    assert sorted(r.video for r in requests[:10]) == list(range(10))
    assert sorted(r.video for r in requests[10:20]) == list(range(10))
    assert len({(r.video, r.start, r.place) for r in requests}) == 25
    other = list(clip_requests(protocol, [50] * 10, generated=25, repeats=1, seed=1))
    assert [r.video for r in other] != [r.video for r in requests]


def test_bad_numbers() -> None:
    protocol = PROTOCOLS["ssv2"]
    with pytest.raises(ValueError, match="none of 2 videos has the 16 frames"):
        clip_requests(protocol, [15, 3])
    with pytest.raises(ValueError, match="generated, repeats: expected at least 1"):
        clip_requests(protocol, [20], generated=0)
    short = dataclasses.replace(protocol, frames=8)
    assert next(iter(clip_requests(short, [8]))).start == 0
