"""Best-of-N on a table worked by hand."""

from __future__ import annotations

import pytest

from magvit_fast.metrics import MAGVIT_BEST, MASKVIT_BEST, TrialScores

# clip -> trials of (psnr, ssim, lpips)
TRIALS = {
    7: [(20.0, 0.5, 0.3), (22.0, 0.4, 0.1), (21.0, 0.6, 0.2)],
    3: [(10.0, 0.9, 0.8), (16.0, 0.1, 0.4)],
}


def _filled(best: frozenset[str]) -> TrialScores:
    scores = TrialScores(best)
    for clip, trials in TRIALS.items():
        for psnr, ssim, lpips in trials:
            scores.add(clip, {"psnr": psnr, "ssim": ssim, "lpips": lpips})
    return scores


def test_magvit_takes_the_best_psnr_and_ssim_and_the_mean_lpips() -> None:
    mean = _filled(MAGVIT_BEST).mean()
    assert mean["psnr"] == pytest.approx((22 + 16) / 2)
    assert mean["ssim"] == pytest.approx((0.6 + 0.9) / 2)  # of another trial than the best PSNR
    assert mean["lpips"] == pytest.approx((0.2 + 0.6) / 2)


def test_maskvit_takes_the_best_of_all_three() -> None:
    mean = _filled(MASKVIT_BEST).mean()
    assert mean["lpips"] == pytest.approx((0.1 + 0.4) / 2)  # the smallest


def test_without_best_every_clip_counts_alike() -> None:
    scores = _filled(frozenset())
    assert scores.mean()["psnr"] == pytest.approx((21 + 13) / 2)
    assert scores.trials == (2, 3)


def test_order_does_not_matter() -> None:
    forward, backward = _filled(MAGVIT_BEST), TrialScores(MAGVIT_BEST)
    for clip, trials in reversed(TRIALS.items()):
        for psnr, ssim, lpips in reversed(trials):
            backward.add(clip, {"psnr": psnr, "ssim": ssim, "lpips": lpips})
    assert forward.mean() == backward.mean()


def test_nothing_and_unknown_metrics() -> None:
    assert TrialScores().mean() == {}
    assert TrialScores().trials == (0, 0)
    with pytest.raises(ValueError, match="best: expected names of"):
        TrialScores(frozenset({"beauty"}))
    with pytest.raises(ValueError, match=r"scores: expected names of .* got 'mse'"):
        TrialScores().add(0, {"mse": 1.0})
