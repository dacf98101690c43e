from __future__ import annotations

import itertools

import pytest
from tests.goldens import load_goldens

from magvit_fast.tasks import task_sequence


@pytest.mark.parametrize("weights", [(1.0,) * 8, (1.0,) * 10, (1.0, 2.0, 0.5)])
def test_counts_of_a_cycle_match_the_release(weights: tuple[float, ...]) -> None:
    name = "_".join(f"{w:g}" for w in weights)
    expected = load_goldens("magvit_v1/02b_token_sequences")[f"task_seq_sorted_counts_{name}"]
    sequence = task_sequence(weights)
    assert [sequence.count(n) for n in range(len(weights))] == expected.tolist()


def test_the_order_is_fixed_by_the_seed_and_mixed() -> None:
    one = task_sequence((1.0, 1.0), seed=3)
    assert one == task_sequence((2, 2), seed=3)
    assert one != task_sequence((1.0, 1.0), seed=4)
    changes = sum(a != b for a, b in itertools.pairwise(one))
    assert 70 < changes < 130  # 100 of 199 expected, deviation 7
    assert task_sequence([1.0]) == [0] * 100


def test_bad_weights() -> None:
    for bad in ((), (1.0, 0.0), (-1.0,)):
        with pytest.raises(ValueError, match="weights: expected positive numbers"):
            task_sequence(bad)
