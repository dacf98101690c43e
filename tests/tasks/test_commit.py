from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.goldens import load_goldens

from magvit_fast.tasks import GIVEN, PARTS, CommitBatch, commit_loss, commit_mask, mask_ratio

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


def test_subtokens_are_reported_apart() -> None:
    """Two heads of four values: one sure of the right value, one of a wrong one, by hand."""
    targets = torch.tensor([[0b1101, 0b0010]])  # sub-tokens (1, 3) and (2, 0)
    batch = commit_mask(targets, u=torch.tensor([0.0]), scores=torch.rand(1, 2))
    logits = torch.zeros(1, 2, 2, 4)
    logits[0, 0, 0, 1] = logits[0, 1, 0, 2] = math.log(97.0)  # p = 0.97
    logits[0, 0, 1, 0] = logits[0, 1, 1, 1] = math.log(97.0)  # 0.01 for the right value
    result = commit_loss(logits, batch, label_smoothing=0.0)
    expected = torch.tensor([-math.log(0.97), -math.log(0.01)])
    torch.testing.assert_close(result.subtokens, expected)
    torch.testing.assert_close(result.loss, expected.sum())


def test_subtokens_add_up_to_the_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 2**6, (3, 10), generator=generator)
    inside = torch.arange(10) < 4
    batch = commit_mask(targets, targets.flip(1), inside, generator=generator)
    logits = torch.randn(3, 10, 2, 8, generator=generator)
    for parts in (PARTS, ("mask",), ("refine", "reconstruct")):
        result = commit_loss(logits, batch, loss_on=parts)
        torch.testing.assert_close(result.subtokens.sum(), result.loss)
        assert result.subtokens.shape == (2,)
        assert not result.subtokens.requires_grad


def test_label_smoothing_is_the_published_one() -> None:
    logits = torch.tensor([[[[2.0, -1.0, 0.5, 0.0]]]])
    batch = commit_mask(torch.tensor([[2]]), u=torch.tensor([0.0]))
    e, log_p = 1e-4, logits[0, 0, 0].log_softmax(-1)
    expected = -sum((1 - e + e / 4 if v == 2 else e / 4) * log_p[v].item() for v in range(4))
    assert commit_loss(logits, batch).loss.item() == pytest.approx(expected, abs=1e-6)


MODES = {"cond->input": "commit", "input->input": "latent", "cond->cond": "fixed", "none": "commit"}


def as_in_the_release(batch: CommitBatch, weight_mode: str) -> dict[str, torch.Tensor]:
    """The five arrays that the release makes of a batch."""
    selected = (batch.part == REFINE) | (batch.part == MASK)
    return {
        "masked_inputs": batch.tokens.masked_fill(batch.mask, -1),
        "uncond_masked_inputs": batch.targets.masked_fill(selected, -1),
        "segment_ids": (batch.part == REFINE).long(),
        "targets": batch.targets,
        "weights": (selected if weight_mode == "mask+refine" else batch.part != GIVEN).float(),
    }


def golden_cases() -> list[tuple[str, str, str, str, str]]:
    """(key, mode, weight mode, region, ratio) of every case of the file but the tied one."""
    keys = {k.rsplit("/", 1)[0] for k in load_goldens(GOLDEN) if k.endswith("/masked_inputs")}
    cases = []
    for key in sorted(keys - {"ties/r0.5"}):
        if key.startswith("none/"):
            cases.append((key, "none", "mask+refine", "", key.split("/")[1]))
        elif key.startswith("persample|"):
            cases.append((key, "cond->input", "mask+refine", "random", "per sample"))
        else:
            modes, region, ratio = key.split("/")
            mode, weight_mode = modes.split("|")
            cases.append((key, mode, weight_mode, region, ratio))
    return cases


def test_every_array_of_the_official_masking() -> None:
    golden = load_goldens(GOLDEN)
    targets, condition = (torch.from_numpy(golden[k]).long().flatten(1) for k in ("z", "z_cond"))
    scores = torch.from_numpy(golden["score"]).flatten(1)
    compared = 0
    for key, mode, weight_mode, region, ratio in golden_cases():
        has_condition = mode != "none"
        inside = (
            torch.from_numpy(golden[f"condmask_{region}"]).flatten(1) if has_condition else None
        )
        shares = (
            golden["ratios"][int(ratio[1:])] if ratio != "per sample" else golden["persample_ratio"]
        )
        batch = commit_mask(
            targets,
            condition if has_condition else None,
            inside,
            mode=MODES[mode],  # type: ignore[arg-type]
            ratio=torch.as_tensor(shares).reshape(-1),
            scores=scores,
        )
        for name, ours in as_in_the_release(batch, weight_mode).items():
            expected = torch.from_numpy(golden[f"{key}/{name}"]).flatten(1)
            assert torch.equal(ours, expected.to(ours.dtype)), (key, name)
            compared += 1
    assert compared == 5 * (len(golden_cases()))
    assert compared >= 500


def test_tied_scores_select_fewer_than_in_the_release() -> None:
    golden = load_goldens(GOLDEN)
    targets = torch.from_numpy(golden["z"]).long().flatten(1)
    scores = torch.from_numpy(golden["tie_score"]).flatten(1)
    batch = commit_mask(targets, ratio=torch.tensor([0.5]), scores=scores)
    theirs = {
        name: torch.from_numpy(golden[f"ties/r0.5/{name}"]).flatten(1)
        for name in as_in_the_release(batch, "mask+refine")
    }
    official = theirs["masked_inputs"] == -1
    assert torch.equal(theirs["uncond_masked_inputs"], theirs["masked_inputs"])
    assert torch.equal(theirs["weights"].bool(), official)
    assert torch.equal(theirs["targets"].long(), batch.targets)
    assert not theirs["segment_ids"].any()
    assert official.sum(1).tolist() == [134, 134, 141]
    assert batch.mask.sum(1).tolist() == [128, 128, 128]
    assert not (batch.mask & ~official).any()


def test_ablation_modes_by_hand() -> None:
    # 6 positions, the first 3 given; half of the other 3, rounded down: the lowest score there
    targets = torch.tensor([[10, 11, 12, 13, 14, 15]])
    condition = torch.tensor([[20, 21, 22, 23, 24, 25]])
    inside = torch.tensor([True, True, True, False, False, False])
    scores = torch.tensor([[0.1, 0.0, 0.3, 0.6, 0.5, 0.7]])
    half = torch.tensor([0.5])
    for mode, shown in (("latent", [10, 11, 12]), ("fixed", [20, 21, 22])):
        batch = commit_mask(targets, condition, inside, mode=mode, ratio=half, scores=scores)  # type: ignore[arg-type]
        assert batch.part.tolist() == [[GIVEN] * 3 + [RECONSTRUCT, MASK, RECONSTRUCT]]
        assert batch.tokens[0, :3].tolist() == shown
        assert batch.targets[0].tolist() == [*shown, 13, 14, 15]
        assert batch.mask[0].tolist() == [False] * 4 + [True, False]
    out = commit_loss(torch.zeros(1, 6, 1, 32), batch, label_smoothing=0.0)
    assert out.loss.item() == pytest.approx(math.log(32))
    assert out.fractions["mask"].item() == pytest.approx(1 / 6)
    assert sum(f.item() for f in out.fractions.values()) == pytest.approx(0.5)
    # nothing left to select
    batch = commit_mask(targets, condition, inside | ~inside, mode="latent", ratio=half)
    assert not batch.mask.any()


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
    with pytest.raises(ValueError, match="ratio: expected 1 or 2 draws"):
        commit_mask(z, ratio=torch.rand(3))
    with pytest.raises(ValueError, match="u and ratio: expected at most one"):
        commit_mask(z, u=torch.rand(1), ratio=torch.rand(1))
    with pytest.raises(ValueError, match="mode: expected one of"):
        commit_mask(z, mode="prefix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="condition_mask: expected bool"):
        commit_mask(z, z, torch.zeros(7, dtype=torch.bool))
    batch = commit_mask(z)
    with pytest.raises(ValueError, match="logits: expected"):
        commit_loss(torch.zeros(2, 9, 1, 4), batch)
    with pytest.raises(ValueError, match="loss_on"):
        commit_loss(torch.zeros(2, 8, 1, 4), batch, loss_on=())
    assert PARTS == ("reconstruct", "refine", "mask")
