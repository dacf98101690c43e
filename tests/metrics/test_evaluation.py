"""The whole evaluation: folds, real clips counted once, batches and processes of any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from magvit_fast.metrics import (
    MAGVIT_BEST,
    C3DLogits,
    Evaluation,
    ImageFeatures,
    Lpips,
    Networks,
    VideoFeatures,
    frechet_distance,
    inception_score,
    psnr,
    spread,
    ssim,
)

SAMPLES = 16


def _videos() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(SAMPLES // 2, 3, 9, 12, 12, generator=generator).repeat(2, 1, 1, 1, 1)
    noise = torch.randn(real.shape, generator=generator) * 0.1
    return (real + noise).clamp(0, 1), real


def _pooled(x: Tensor) -> Tensor:
    return x.mean((-1, -2)).flatten(1)[:, :6]


def _networks() -> Networks:
    return Networks(
        fvd=VideoFeatures(_pooled, size=12),
        fid=ImageFeatures(_pooled, size=12),
        inception=C3DLogits(lambda x: _pooled(x) / 20),
        lpips=Lpips(lambda images: [images], [torch.ones(3)]),
    )


def _slack(name: str) -> float:
    """A spread is a difference of nearly equal numbers, which batches round differently."""
    return 1e-4 if name.endswith("_std") else 1e-9


CLIPS = [*range(SAMPLES // 2)] * 2
FOLDS = [0] * (SAMPLES // 2) + [1] * (SAMPLES // 2)


def _add(evaluation: Evaluation, which: list[int], batch: int) -> Evaluation:
    generated, real = _videos()
    for start in range(0, len(which), batch):
        part = which[start : start + batch]
        evaluation.add(
            generated[part],
            real[part],
            clips=[CLIPS[i] for i in part],
            folds=[FOLDS[i] for i in part],
            first=[True] * len(part),
        )
    return evaluation


def test_results_are_those_of_the_parts() -> None:
    generated, real = _videos()
    networks = _networks()
    found = _add(
        Evaluation(networks, folds=2, best=MAGVIT_BEST), [*range(SAMPLES)], SAMPLES
    ).results()
    assert found["samples"] == SAMPLES
    assert found["trials_per_clip"] == [1, 1]
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        values = measure(generated, real).view(2, -1).mean(1).tolist()
        assert found[f"{name}_folds"] == pytest.approx(values, rel=1e-6)
        stated = (found[name], found[f"{name}_std"])
        assert stated == pytest.approx(spread(found[f"{name}_folds"]), rel=1e-9)
    assert networks.lpips is not None
    expected = networks.lpips(generated, real).mean()
    assert found["lpips"] == pytest.approx(float(expected), rel=1e-6)
    for name, features in (("fvd", networks.fvd), ("fid", networks.fid)):
        assert features is not None
        values = [
            frechet_distance(features(real[part]), features(generated[part]))
            for part in (slice(0, 8), slice(8, 16))
        ]
        assert found[f"{name}_folds"] == pytest.approx(values, rel=1e-6)
        stated = (found[name], found[f"{name}_std"])
        assert stated == pytest.approx(spread(found[f"{name}_folds"]), rel=1e-9)
    assert networks.inception is not None
    logits = networks.inception(generated)
    values = [inception_score(logits[:8]), inception_score(logits[8:])]
    assert found["inception_score_folds"] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batches_of_any_size(batch: int) -> None:
    """The second fold shares some batches with the first."""
    order = [*range(SAMPLES)]
    whole = _add(Evaluation(_networks(), folds=2), order, SAMPLES).results()
    parts = _add(Evaluation(_networks(), folds=2), order, batch).results()
    assert set(parts) == set(whole)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=_slack(name)), name


def test_a_real_clip_counts_once() -> None:
    generated, real = _videos()
    evaluation = Evaluation(Networks(fvd=VideoFeatures(_pooled, size=12)))
    first = [i < 8 for i in range(SAMPLES)]
    evaluation.add(generated, real, clips=CLIPS, first=first)
    features = VideoFeatures(_pooled, size=12)
    expected = frechet_distance(features(real[:8]), features(generated))
    assert evaluation.results()["fvd"] == pytest.approx(expected, rel=1e-6)


def test_the_best_trial_is_one_of_its_fold() -> None:
    generated, real = _videos()
    values = psnr(generated, real).view(2, -1)
    one = Evaluation(best=MAGVIT_BEST)
    one.add(generated, real, clips=CLIPS)
    assert one.results()["trials_per_clip"] == [2, 2]
    assert one.results()["psnr"] == pytest.approx(float(values.amax(0).mean()), rel=1e-6)
    two = Evaluation(folds=2, best=MAGVIT_BEST)
    two.add(generated, real, clips=CLIPS, folds=FOLDS)
    assert two.results()["psnr"] == pytest.approx(float(values.mean()), rel=1e-6)


def test_unpaired_samples_are_not_compared_one_by_one() -> None:
    generated, real = _videos()
    evaluation = Evaluation(Networks(fvd=VideoFeatures(_pooled, size=12)))
    evaluation.add(generated, real, clips=CLIPS, paired=False)
    assert set(evaluation.results()) == {"samples", "fvd"}


def test_bad_input() -> None:
    generated, real = _videos()
    with pytest.raises(ValueError, match="folds: expected at least 1"):
        Evaluation(folds=0)
    evaluation = Evaluation(Networks(fvd=VideoFeatures(_pooled, size=12)))
    with pytest.raises(ValueError, match="as many samples as real clips"):
        evaluation.add(generated, real[:3], clips=CLIPS)
    with pytest.raises(ValueError, match="as many samples as real clips"):
        evaluation.add(generated, real, clips=[0])
    with pytest.raises(ValueError, match="folds: expected 0 to 0"):
        evaluation.add(generated, real, clips=CLIPS, folds=FOLDS)
    evaluation.add(generated[:1], real[:1], clips=[0])
    with pytest.raises(ValueError, match=r"fvd: expected at least 2 samples a side .* got 1 real"):
        evaluation.results()
    assert Evaluation().results() == {"samples": 0}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mine = [i for i in range(SAMPLES) if i % 3 == 0 or i > 12 if rank == 0] or [
        i for i in range(SAMPLES) if not (i % 3 == 0 or i > 12)
    ]
    evaluation = Evaluation(_networks(), folds=2, best=MAGVIT_BEST)
    torch.save(_add(evaluation, mine, 4).results(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(_work, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = _add(
        Evaluation(_networks(), folds=2, best=MAGVIT_BEST), [*range(SAMPLES)], 4
    ).results()
    found: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert found[0] == found[1]
    assert set(found[0]) == set(expected)
    for name, value in expected.items():
        assert found[0][name] == pytest.approx(value, rel=1e-5, abs=_slack(name)), name
