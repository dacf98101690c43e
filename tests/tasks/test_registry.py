from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.compat.magvit_sequences import task_token
from magvit_fast.tasks import TASKS, ClipGeometry, FrameTask, RegionTask, Task, get_task, regions
from magvit_fast.tasks.regions import window_starts

GOLDEN = "magvit_v1/03_tasks_16x32x32"
V1 = {g: ClipGeometry(16, 32, 32, g, causal=False) for g in ((4, 16, 16), (4, 8, 8))}
V2 = ClipGeometry(17, 128, 128, (5, 16, 16), causal=True)
OFFICIAL = {
    "frame_prediction": "frame_prediction",
    "frame_interpolation": "frame_interpolation",
    "outpainting_central": "outpainting_c",
    "outpainting_vertical": "outpainting_v",
    "outpainting_horizontal": "outpainting_h",
    "outpainting_dynamic": "outpainting_dv",
    "inpainting_central": "inpainting_c",
    "inpainting_dynamic": "inpainting_dv",
    "class_frame_prediction": "frame_prediction_class",
}


def test_all_contract_names_are_there() -> None:
    assert set(TASKS) == {*OFFICIAL, "class_generation"}
    assert {n for n, t in TASKS.items() if t.class_conditional} == {
        "class_generation", "class_frame_prediction",
    }  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_conditions_match_the_official_code(name: str) -> None:
    golden, task, key = load_goldens(GOLDEN), TASKS[name], OFFICIAL[name]
    video = torch.from_numpy(golden["video"]).permute(0, 4, 1, 2, 3)
    condition = task.condition_video(video, V1[4, 16, 16]).permute(0, 2, 3, 4, 1)
    expected = torch.from_numpy(golden[f"{key}/cond_video"])
    tolerance = 1e-6 if name == "frame_interpolation" else 0.0
    torch.testing.assert_close(condition, expected, atol=tolerance, rtol=0)
    pixel_mask = task.pixel_mask(V1[4, 16, 16])
    assert np.array_equal(pixel_mask.numpy(), golden[f"{key}/pixel_mask"])
    for (t, h, w), geometry in V1.items():
        official = golden[f"{key}/latent_mask_{t}x{h}x{w}"]
        assert np.array_equal(task.token_mask(geometry).numpy(), official)


def test_frame_task_variants_match_the_official_code() -> None:
    golden = load_goldens(GOLDEN)
    video = torch.from_numpy(golden["video"]).permute(0, 4, 1, 2, 3)
    geometry = V1[4, 16, 16]
    # five given frames: the code's mask needs its slot option; the strict rule finds both slots
    five = dataclasses.replace(TASKS["frame_prediction"], first=5)
    official = golden["frame_prediction_5_slots2/latent_mask_4x16x16"]
    assert np.array_equal(five.token_mask(geometry).numpy(), official)
    condition = five.condition_video(video[:, :, :5], geometry).permute(0, 2, 3, 4, 1)
    assert np.array_equal(condition.numpy(), golden["frame_prediction_5/cond_video"])
    two = dataclasses.replace(TASKS["frame_interpolation"], first=2, last=2)
    condition = two.condition_video(video, geometry).permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(
        condition.numpy(), golden["frame_interpolation_2/cond_video"], atol=1e-6
    )
    official = golden["frame_interpolation_2/latent_mask_4x16x16"]
    assert np.array_equal(two.token_mask(geometry).numpy(), official)


def quarter(grid: tuple[int, int, int]) -> torch.Tensor:
    """The region of the release's out- and inpainting when nothing is set: the top left quarter."""
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[:, : grid[1] // 2, : grid[2] // 2] = True
    return inside


# Every entry of the file: the release's name -> our task, the slots that it was made with.
ENTRIES: dict[str, Task] = {
    **{official: TASKS[name] for name, official in OFFICIAL.items()},
    "full_generation": TASKS["class_generation"],
    "frame_prediction_5": dataclasses.replace(TASKS["frame_prediction"], first=5, slots=1),
    "frame_prediction_5_slots2": dataclasses.replace(TASKS["frame_prediction"], first=5, slots=2),
    "frame_interpolation_2": dataclasses.replace(TASKS["frame_interpolation"], first=2, last=2),
    "outpainting_default": RegionTask(
        "corner", "outpainting", region=quarter, fill=regions.replicate_around(quarter)
    ),
    "inpainting_default": RegionTask(
        "all but a corner", "inpainting", region=regions.complement(quarter),
        fill=regions.black_outside(regions.complement(quarter)),
    ),
}  # fmt: skip


def holds_a_given_pixel(task: Task, geometry: ClipGeometry) -> torch.Tensor:
    """The paper's rule in its strict reading: a token conditions when its supervoxel has a given pixel."""
    (t, h, w), given = geometry.grid, task.pixel_mask(geometry)
    blocks = given.view(t, given.shape[0] // t, h, given.shape[1] // h, w, given.shape[2] // w)
    return blocks.any(5).any(3).any(1)


@pytest.mark.parametrize("key", ENTRIES)
def test_every_array_of_a_task_matches_the_official_code(key: str) -> None:
    golden, task = load_goldens(GOLDEN), ENTRIES[key]
    conditional = task.has_condition
    video = torch.from_numpy(golden["video"]).permute(0, 4, 1, 2, 3)
    big = V1[4, 16, 16]
    if conditional:
        condition = task.condition_video(video, big).permute(0, 2, 3, 4, 1)
        tolerance = 1e-6 if "interpolation" in key else 0.0
        expected = torch.from_numpy(golden[f"{key}/cond_video"])
        torch.testing.assert_close(condition, expected, atol=tolerance, rtol=0)
        pixels = task.pixel_mask(big)
        assert np.array_equal(pixels.numpy(), golden[f"{key}/pixel_mask"])
        fraction = 1 - pixels.double().mean().item()
        assert fraction == pytest.approx(float(golden[f"{key}/pixel_masked_fraction"]))
        varies = golden[f"{key}/pixel_mask_native_shape"][1:4] > 1
        assert all(v or (pixels == pixels.narrow(i, 0, 1)).all() for i, v in enumerate(varies))
    for (t, h, w), geometry in V1.items():
        name = f"{t}x{h}x{w}"
        tokens = task.token_mask(geometry)
        number = golden[f"tasks_{name}"].tolist().index(key)
        prompt = task_token(task)
        assert prompt == int(golden[f"task_tokens_{name}"][number])
        if not conditional:
            assert not tokens.any()
            continue
        assert np.array_equal(tokens.numpy(), golden[f"{key}/latent_mask_{name}"])
        fraction = 1 - tokens.double().mean().item()
        assert fraction == pytest.approx(float(golden[f"{key}/latent_masked_fraction_{name}"]))
        varies = golden[f"{key}/latent_mask_native_shape_{name}"][1:] > 1
        assert all(v or (tokens == tokens.narrow(i, 0, 1)).all() for i, v in enumerate(varies))
        strict = holds_a_given_pixel(task, geometry)
        assert np.array_equal(strict.numpy(), golden[f"{key}/latent_mask_strict_pixel_rule_{name}"])


def test_the_strict_rule_differs_for_moving_windows_and_five_frames_alone() -> None:
    for size in (64, 128):
        geometry = ClipGeometry(16, size, size, (4, 16, 16), causal=False)
        masked = {
            name: 1 - holds_a_given_pixel(TASKS[name], geometry).float().mean().item()
            for name in OFFICIAL
        }
        assert masked["outpainting_dynamic"] == 0.375
        assert masked["inpainting_dynamic"] == 0.1875
        for name, fraction in masked.items():
            if "dynamic" not in name:
                ours = 1 - TASKS[name].token_mask(geometry).float().mean().item()
                assert fraction == ours
    five = dataclasses.replace(TASKS["frame_prediction"], first=5)
    assert torch.equal(five.token_mask(geometry), holds_a_given_pixel(five, geometry))


def test_interpolation_blends_as_printed() -> None:
    """n = 14: frame j is (1 - j / 15) * first + (j / 15) * last."""
    video = torch.rand(1, 3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    geometry = ClipGeometry(16, 8, 8, (4, 2, 2), causal=False)
    made = TASKS["frame_interpolation"].condition_video(video, geometry)
    for j in range(16):
        expected = (1 - j / 15) * video[:, :, 0] + (j / 15) * video[:, :, 15]
        torch.testing.assert_close(made[:, :, j], expected, atol=1e-6, rtol=0)


def test_frame_prediction_on_v2() -> None:
    task = TASKS["frame_prediction"]
    assert task.token_mask(V2).flatten(1).all(1).tolist() == [True, True, False, False, False]
    assert task.pixel_mask(V2).flatten(1).all(1).sum() == 5
    video = torch.rand(1, 3, 5, 128, 128)  # only what is given is needed
    condition = task.condition_video(video, V2)
    assert condition.shape == (1, 3, 17, 128, 128)
    assert torch.equal(condition[:, :, :5], video)
    assert torch.equal(condition[:, :, 5:], video[:, :, 4:].expand(-1, -1, 12, -1, -1))
    slots = [V2.slots_of_first(n) for n in (1, 2, 5, 6, 9, 17)]
    assert slots == [1, 2, 2, 3, 3, 5]
    interpolation = TASKS["frame_interpolation"].token_mask(V2).flatten(1).all(1)
    assert interpolation.tolist() == [True, False, False, False, True]


def test_window_starts() -> None:
    golden = load_goldens(GOLDEN)
    for width, steps in ((32, 16), (64, 16), (128, 16)):
        assert window_starts(steps, width) == golden[f"dynamic_start_w{width}_t16"].tolist()
    for width, steps in ((8, 4), (16, 4), (4, 2), (8, 5), (16, 5)):
        assert (
            window_starts(steps, width)
            == golden[f"dynamic_latent_start_w{width}_t{steps}"].tolist()
        )
    assert window_starts(16, 128) == [0, 4, 9, 13, 17, 21, 26, 30, 34, 38, 43, 47, 51, 55, 60, 64]
    assert window_starts(16, 64) == [0, 2, 4, 6, 9, 11, 13, 15, 17, 19, 21, 23, 26, 28, 30, 32]
    assert window_starts(4, 16) == [0, 3, 5, 8]
    assert window_starts(4, 8) == [0, 1, 3, 4]


def test_masked_token_fractions() -> None:
    fractions = {
        "frame_prediction": 0.75, "frame_interpolation": 0.5, "outpainting_central": 0.75,
        "outpainting_vertical": 0.5, "outpainting_horizontal": 0.5, "outpainting_dynamic": 0.5,
        "inpainting_central": 0.25, "inpainting_dynamic": 0.25, "class_generation": 1.0,
        "class_frame_prediction": 0.75,
    }  # fmt: skip
    for name, fraction in fractions.items():
        mask = TASKS[name].token_mask(V1[4, 16, 16])
        assert 1 - mask.float().mean().item() == pytest.approx(fraction), name


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"task: expected one of frame_prediction, .* got 'nope'"):
        get_task("nope")
    task = TASKS["frame_prediction"]
    with pytest.raises(ValueError, match="needs at least 5 frames, got 4"):
        task.condition_video(torch.rand(1, 3, 4, 128, 128), V2)
    with pytest.raises(ValueError, match="expected 128x128 pixels, got 64x128"):
        task.condition_video(torch.rand(1, 3, 17, 64, 128), V2)
    with pytest.raises(ValueError, match="takes no condition video"):
        TASKS["class_generation"].condition_video(torch.rand(1, 3, 17, 128, 128), V2)
    with pytest.raises(ValueError, match="below the clip's 17"):
        FrameTask("x", "x", first=17).token_mask(V2)
    with pytest.raises(ValueError, match="expected 1 to 5 condition slots, got 6"):
        FrameTask("x", "x", first=2, slots=6).token_mask(V2)
    with pytest.raises(ValueError, match="18 frames do not divide into 5 causal"):
        ClipGeometry(18, 8, 8, (5, 1, 1), causal=True)
