"""The order of training is a pure function of the batch number."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magvit_fast.data.order import BatchOrder


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1), st.integers(0, 9))
def test_processes_share_each_batch(size, share, processes, ratio, seed):
    facts = {"num_clips": size, "num_stills": size, "still_ratio": ratio, "seed": seed}
    whole = BatchOrder(batch_size=share * processes, **facts)
    parts = [
        BatchOrder(batch_size=share * processes, rank=r, num_processes=processes, **facts)
        for r in range(processes)
    ]
    for number in range(8):
        assert whole.batch(number) == [d for part in parts for d in part.batch(number)]


def test_every_epoch_visits_everything_once_in_a_new_order():
    order = BatchOrder(num_clips=10, batch_size=4, seed=3)
    draws = [draw for batch in order.batches(0, 5) for draw in batch]
    first, second = draws[:10], draws[10:]
    assert sorted(d.index for d in first) == sorted(d.index for d in second) == list(range(10))
    assert {d.epoch for d in first} == {0}
    assert {d.epoch for d in second} == {1}
    assert [d.index for d in first] != [d.index for d in second]


def test_starting_late_equals_running_on():
    order = BatchOrder(num_clips=7, num_stills=9, still_ratio=0.3, batch_size=2, seed=1)
    assert list(order.batches(0, 20))[11:] == list(order.batches(11, 20))


def test_still_ratio_is_exact_and_stills_too_are_visited_evenly():
    order = BatchOrder(num_clips=100, num_stills=5, still_ratio=0.25, batch_size=5)
    batches = list(order.batches(0, 40))
    stills = [batch for batch in batches if batch[0].still]
    assert len(stills) == 10
    assert all(sorted(d.index for d in batch) == list(range(5)) for batch in stills)
    assert all(draw.still == batch[0].still for batch in batches for draw in batch)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_clips": 0, "batch_size": 1}, "num_clips"),
        ({"num_clips": 1, "batch_size": 3, "num_processes": 2}, "batch_size"),
        ({"num_clips": 1, "batch_size": 1, "still_ratio": 0.5}, "num_stills"),
        ({"num_clips": 1, "batch_size": 1, "still_ratio": 1.5}, "still_ratio"),
    ],
)
def test_bad_settings_are_named(facts, message):
    with pytest.raises(ValueError, match=message):
        BatchOrder(**facts)
