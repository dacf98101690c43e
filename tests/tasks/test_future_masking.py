"""MaskViT's masking rule and its loss, on examples worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from magvit_fast.tasks import future_loss, given_frames, mask_future


def test_given_frames() -> None:
    assert given_frames(4, 1).tolist() == [True, False, False, False]
    assert given_frames(4, 2, goal=True).tolist() == [True, True, False, True]
    for frames, first, goal in ((4, 4, False), (4, 3, True), (4, 0, False), (1, 1, False)):
        with pytest.raises(ValueError, match="first: expected at least 1 given frame"):
            given_frames(frames, first, goal=goal)


def test_a_hand_worked_example() -> None:
    """Two videos of 3 frames of 1 x 4 tokens, the first given: 8 future tokens."""
    ids = torch.zeros(2, 3, 1, 4, dtype=torch.int64)
    scores = torch.tensor(
        [
            [[0.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.8, 0.2], [0.7, 0.3, 0.6, 0.4]],
            [[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]],
        ]
    ).unsqueeze(2)
    u = torch.tensor([0.0, 0.6])  # r = 0.5 and 0.8: 4 and round(6.4) = 6 tokens
    unknown = mask_future(ids, given_frames(3, 1), u=u, scores=scores)
    assert unknown.squeeze(2).int().tolist() == [
        [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1]],
        [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]],  # ties by position
    ]
    goal = mask_future(ids, given_frames(3, 1, goal=True), u=u, scores=scores)
    assert goal.flatten(2).sum(2).tolist() == [[0, 2, 0], [0, 3, 0]]  # round(0.8 * 4) = 3


def test_counts_follow_the_ratio_and_given_frames_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(64, 5, 4, 4, dtype=torch.int64)
    known = given_frames(5, 2)
    u = torch.rand(64, generator=generator)
    unknown = mask_future(ids, known, u=u, generator=generator)
    assert not unknown[:, known].any()
    expected = ((0.5 + 0.5 * u.double()) * 48).round().long()
    assert torch.equal(unknown.flatten(1).sum(1), expected)
    drawn = mask_future(ids, known, generator=generator).flatten(1).sum(1)
    assert drawn.min() >= 24
    assert drawn.max() <= 48
    assert len(drawn.unique()) > 12  # one ratio a video
    fixed = mask_future(ids, known, ratios=(0.75, 0.75), generator=generator)
    assert torch.equal(fixed.flatten(1).sum(1), torch.full((64,), 36))
    assert len(fixed.flatten(1).unique(dim=0)) == 64  # other positions in each
    # every future position is masked about as often as any other
    often = mask_future(ids.expand(64, -1, -1, -1), known, ratios=(0.5, 0.5), generator=generator)
    assert 0.2 < often.float().mean(0)[2:].min() <= often.float().mean(0)[2:].max() < 0.8


def test_the_least_is_one_token() -> None:
    ids = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    for ratios in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        assert mask_future(ids, given_frames(2, 1), ratios=ratios).flatten().tolist() == [0, 1]


def test_the_loss_is_of_masked_tokens_alone_and_every_video_weighs_the_same() -> None:
    logits = torch.zeros(2, 2, 1, 2, 4, requires_grad=True)
    ids = torch.tensor([[[0, 1], [2, 3]], [[0, 0], [0, 0]]]).view(2, 2, 1, 2)
    unknown = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 1]]]).bool().view(2, 2, 1, 2)
    with torch.no_grad():
        logits[0, 1, 0, 0, 2] = 3.0  # right
        logits[0, 1, 0, 1, 0] = 2.0  # wrong
        logits[1, 1, 0, 1, 0] = 1.0  # right
    result = future_loss(logits, ids, unknown)

    def nats(score: float, others: float, right: bool) -> float:
        z = math.exp(score) + 3 * math.exp(others)
        return math.log(z) - (score if right else others)

    first = (nats(3, 0, True) + nats(2, 0, False)) / 2
    assert result.loss.item() == pytest.approx((first + nats(1, 0, True)) / 2)
    assert result.accuracy.item() == pytest.approx((0.5 + 1.0) / 2)
    result.loss.backward()
    assert torch.equal(logits.grad.any(-1), unknown)


def test_the_loss_equals_cross_entropy_where_videos_have_equal_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8, (3, 3, 2, 2), generator=generator)
    logits = torch.randn(3, 3, 2, 2, 8, generator=generator)
    unknown = mask_future(ids, given_frames(3, 1), ratios=(0.75, 0.75), generator=generator)
    expected = F.cross_entropy(logits[unknown], ids[unknown])
    torch.testing.assert_close(future_loss(logits, ids, unknown).loss, expected)


def test_bad_input_names_the_argument() -> None:
    ids, known = torch.zeros(2, 3, 2, 2, dtype=torch.int64), given_frames(3, 1)
    for arguments, message in (
        ((ids[0], known), r"ids: expected \[B, T, h, w\]"),
        ((ids, known[:2]), r"known: expected bool \(3,\)"),
        ((ids, known.int()), "known: expected bool"),
        ((ids, torch.ones(3, dtype=torch.bool)), "known: expected frames to predict"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_future(*arguments)
    with pytest.raises(ValueError, match=r"ratios: expected 0 <= low <= high <= 1, got \(0\.9, 0"):
        mask_future(ids, known, ratios=(0.9, 0.5))
    with pytest.raises(ValueError, match=r"u: expected \(2,\), got \(3,\)"):
        mask_future(ids, known, u=torch.rand(3))
    with pytest.raises(ValueError, match="scores: expected"):
        mask_future(ids, known, scores=torch.rand(2, 12))
    with pytest.raises(ValueError, match="logits: expected"):
        future_loss(torch.zeros(2, 3, 2, 3, 8), ids, ids.bool())
