from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.goldens import load_goldens

from magvit_fast.tasks import PARTS, commit_loss, commit_mask, mask_ratio

GOLDEN = "magvit_v1/02_training_mask"
RECONSTRUCT, REFINE, MASK = range(3)


def test_a_hand_worked_example() -> None:
    # 6 positions, condition region = the first 3; cos(pi/3) = 1/2 -> 3 selected: scores .1 .2 .3
    targets = torch.tensor([[10, 11, 12, 13, 14, 15]])
    condition = torch.tensor([[20, 21, 22, 23, 24, 25]])
    inside = torch.tensor([True, True, True, False, False, False])
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.8, 0.7]])
    batch = commit_mask(targets, condition, inside, u=torch.tensor([2 / 3 - 1e-6]), scores=scores)
    assert batch.part.tolist() == [[REFINE, RECONSTRUCT, REFINE, MASK, RECONSTRUCT, RECONSTRUCT]]
    assert batch.mask.tolist() == [[False, False, False, True, False, False]]
    assert batch.tokens[~batch.mask].tolist() == [20, 11, 22, 14, 15]

    # logits of two sub-tokens with 16 values: uniform but for the first position
    logits = torch.zeros(1, 6, 2, 16)
    logits[0, 0, 0, 10] = math.log(17.0)  # p = 17/32 for the right value of sub-token 0
    out = commit_loss(logits, batch, label_smoothing=0.0)
    uniform, first = 2 * math.log(16), math.log(16) - math.log(17 / 32)
    assert out.parts["mask"].item() == pytest.approx(uniform, abs=1e-5)
    assert out.parts["reconstruct"].item() == pytest.approx(uniform, abs=1e-5)
    assert out.parts["refine"].item() == pytest.approx((uniform + first) / 2, abs=1e-5)
    assert out.loss.item() == pytest.approx((5 * uniform + first) / 6, abs=1e-5)
    assert {k: round(v.item() * 6) for k, v in out.fractions.items()} == {
        "reconstruct": 3, "refine": 2, "mask": 1,
    }  # fmt: skip
    masked_only = commit_loss(logits, batch, label_smoothing=0.0, loss_on=("mask",))
    assert masked_only.loss.item() == pytest.approx(uniform, abs=1e-5)


def test_label_smoothing_is_the_published_one() -> None:
    logits = torch.tensor([[[[2.0, -1.0, 0.5, 0.0]]]])
    batch = commit_mask(torch.tensor([[2]]), u=torch.tensor([0.0]))
    e, log_p = 1e-4, logits[0, 0, 0].log_softmax(-1)
    expected = -sum((1 - e + e / 4 if v == 2 else e / 4) * log_p[v].item() for v in range(4))
    assert commit_loss(logits, batch).loss.item() == pytest.approx(expected, abs=1e-6)


def test_matches_the_official_masking() -> None:
    golden = load_goldens(GOLDEN)
    targets = torch.from_numpy(golden["z"]).long().flatten(1)
    condition = torch.from_numpy(golden["z_cond"]).long().flatten(1)
    scores = torch.from_numpy(golden["score"]).flatten(1)
    compared = 0
    for region in ("frame_prediction", "outpainting_central", "inpainting_dynamic", "random"):
        inside = torch.from_numpy(golden[f"condmask_{region}"]).flatten(1)
        for i, ratio in enumerate(golden["ratios"]):
            key = f"cond->input|mask+refine/{region}/r{i}"
            if f"{key}/masked_inputs" not in golden:
                continue
            expected = torch.from_numpy(golden[f"{key}/masked_inputs"]).long().flatten(1)
            u = torch.tensor([math.acos(float(ratio)) * 2 / math.pi])
            if not torch.allclose(mask_ratio(u), torch.tensor(float(ratio)), atol=1e-6):
                continue
            batch = commit_mask(targets, condition, inside, u=u, scores=scores)
            if abs(float(ratio) * 256 - round(float(ratio) * 256)) < 1e-3:
                # an exact-integer count: the round trip through u may land one lower
                assert abs(int((batch.part != 0).sum(1)[0]) - round(float(ratio) * 256)) <= 1
                continue
            assert torch.equal(batch.tokens.masked_fill(batch.mask, -1), expected), key
            compared += 1
    assert compared >= 12


@given(data=st.data())
def test_every_position_is_what_its_part_says(data: st.DataObject) -> None:
    batch, n = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    targets = torch.randint(0, 100, (batch, n), generator=generator)
    condition = torch.randint(100, 200, (batch, n), generator=generator)
    inside = torch.rand(batch, n, generator=generator) < 0.4
    u = torch.rand(1, generator=generator)
    out = commit_mask(targets, condition, inside, u=u, generator=generator)
    refine, mask = out.part == REFINE, out.part == MASK
    assert torch.equal(out.mask, mask)
    assert not (refine & ~inside).any()
    assert not (mask & inside).any()
    assert torch.equal(out.tokens[refine], condition[refine])
    assert torch.equal(out.tokens[out.part == RECONSTRUCT], targets[out.part == RECONSTRUCT])
    selected = max(1, math.floor(n * float(mask_ratio(u))))
    assert (out.part != RECONSTRUCT).sum(1).tolist() == [selected] * batch


def test_ratio_per_batch_and_per_sample() -> None:
    targets = torch.zeros(4, 100, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    counts = (commit_mask(targets, generator=generator).part == MASK).sum(1)
    assert counts.unique().numel() == 1
    u = torch.tensor([0.0, 1.0, 0.5, 2 / 3 + 1e-4])
    counts = (commit_mask(targets, u=u, generator=generator).part == MASK).sum(1)
    assert counts.tolist() == [100, 1, 70, 49]
    counts = (commit_mask(targets, per_sample=True, generator=generator).part == MASK).sum(1)
    assert counts.unique().numel() > 1


def test_ties_select_exactly_n() -> None:
    targets = torch.zeros(2, 10, dtype=torch.int64)
    batch = commit_mask(targets, u=torch.tensor([2 / 3 - 1e-6]), scores=torch.full((2, 10), 0.5))
    assert (batch.part == MASK).sum(1).tolist() == [5, 5]


def test_bad_inputs() -> None:
    z = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(TypeError, match="targets: expected int64"):
        commit_mask(z.float())
    with pytest.raises(ValueError, match="expected both or neither"):
        commit_mask(z, z)
    with pytest.raises(ValueError, match="u: expected 1 or 2 draws"):
        commit_mask(z, u=torch.rand(3))
    with pytest.raises(ValueError, match="condition_mask: expected bool"):
        commit_mask(z, z, torch.zeros(7, dtype=torch.bool))
    batch = commit_mask(z)
    with pytest.raises(ValueError, match="logits: expected"):
        commit_loss(torch.zeros(2, 9, 1, 4), batch)
    with pytest.raises(ValueError, match="loss_on"):
        commit_loss(torch.zeros(2, 8, 1, 4), batch, loss_on=())
    assert PARTS == ("reconstruct", "refine", "mask")
