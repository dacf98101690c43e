"""`generate --sheet`: one picture of all ten tasks, by models that serve them all or only some."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import magvit_fast as mf
from magvit_fast.cli.generate import _all_tasks, _sheet_class
from magvit_fast.cli.task_sheet import _shown, _strip, run_tasks, synthetic_video
from magvit_fast.data.synthetic import DEMO_SEED, demo_clip
from magvit_fast.data.video import read_video
from magvit_fast.decoding import clip_geometry
from magvit_fast.metrics import psnr
from magvit_fast.models import MaskedTransformer, MaskedTransformerConfig, load_tokenizer
from magvit_fast.tasks import TASKS, ClipGeometry

pytest.importorskip("matplotlib")
ALL = ("generate", "--task", "all", "--steps", "2")


def test_all_ten_tasks_of_a_multi_task_model(
    cli: Callable, first_generation: list[str], clip: str, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    words = (*ALL, "--sheet", sheet, *first_generation, "--video", clip, "--class-id", "1")
    result = cli(*words, "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert list(facts["tasks"]) == list(TASKS)
    assert all(task["served"] for task in facts["tasks"].values())
    assert facts["tasks"]["class_generation"]["psnr"] is None
    video = read_video(clip, frames=8, size=16).unsqueeze(0)
    tokenizer = load_tokenizer(first_generation[1])
    transformer = MaskedTransformer.from_pretrained(first_generation[3])
    for name, options in (("inpainting_dynamic", {}), ("class_frame_prediction", {"class_id": 1})):
        made = mf.generate(tokenizer, transformer, task=name, video=video, steps=2, **options)
        expected = float(psnr(made, video))
        assert facts["tasks"][name]["psnr"] == pytest.approx(expected, rel=1e-4)


def test_results_hold_what_the_model_was_given(first_generation: list[str], clip: str) -> None:
    tokenizer = load_tokenizer(first_generation[1])
    transformer = MaskedTransformer.from_pretrained(first_generation[3])
    geometry = clip_geometry(tokenizer, transformer)
    video = read_video(clip, frames=8, size=16).unsqueeze(0)
    tasks = [TASKS[name] for name in ("outpainting_vertical", "class_generation")]
    options = {"steps": 2, "seed": 0}
    outpainted, invented = run_tasks(tokenizer, transformer, geometry, tasks, video, 0, options)
    assert outpainted.condition is not None
    assert torch.equal(outpainted.condition, tasks[0].condition_video(video, geometry)[0])
    assert torch.equal(outpainted.truth, video[0])
    assert (invented.condition, invented.class_id, invented.psnr) == (None, 0, None)
    assert invented.result is not None


def test_tasks_that_the_model_cannot_serve(cli: Callable, models: Any, tmp_path: Path) -> None:
    """A causal pair that knows two prompts and no class says so for the rest; no video is needed."""
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(3, 4, 4), num_subtokens=2,
        subtoken_size=8, prompts=("frame_prediction", "outpainting"),
    )  # fmt: skip
    MaskedTransformer(config).save_pretrained(tmp_path / "some")
    pair = ("--tokenizer", models.tokenizer, "--transformer", tmp_path / "some")
    result = cli(*ALL, "--sheet", tmp_path / "sheet.png", *pair, "--json")
    assert result.status == 0, result.err
    tasks = json.loads(result.out)["tasks"]
    served = {name for name, task in tasks.items() if task["served"]}
    assert served == {
        "frame_prediction", "outpainting_central", "outpainting_vertical",
        "outpainting_horizontal", "outpainting_dynamic",
    }  # fmt: skip
    assert "one of the model's prompts" in tasks["inpainting_central"]["reason"]
    assert "has no classes" in tasks["class_frame_prediction"]["reason"]
    text = cli(*ALL, "--sheet", tmp_path / "sheet.png", *pair).out
    assert "not served: task: expected one of the model's prompts" in text
    assert "dB PSNR" in text


@pytest.mark.parametrize("classes", [2, 4])
def test_the_rendered_scene_comes_with_its_class(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model may have been trained on scenes, whose floors are classes."""
    monkeypatch.setattr(
        "magvit_fast.cli.generate.scene_class", lambda seed: 3 * (seed == DEMO_SEED)
    )
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(3, 4, 4), num_subtokens=2,
        subtoken_size=8, num_classes=classes,
    )  # fmt: skip
    model, args = MaskedTransformer(config), argparse.Namespace(class_id=None, video=None)
    assert _sheet_class(args, model) == (3 if classes == 4 else 0)
    assert _sheet_class(argparse.Namespace(class_id=1, video=None), model) == 1
    assert _sheet_class(argparse.Namespace(class_id=None, video="clip.mp4"), model) == 0


def test_one_task(cli: Callable, models: Any, tmp_path: Path) -> None:
    words = ("generate", "--task", "frame_interpolation", "--steps", "2", "--json")
    result = cli(*words, "--sheet", tmp_path / "sheet.png", *models.both)
    assert result.status == 0, result.err
    assert list(json.loads(result.out)["tasks"]) == ["frame_interpolation"]


def test_given_frames_are_those_of_frame_prediction() -> None:
    changed = {task.name: task for task in _all_tasks(3)}
    assert list(changed) == list(TASKS)
    assert {name for name in TASKS if changed[name] != TASKS[name]} == {
        "frame_prediction",
        "class_frame_prediction",
    }
    for name in ("frame_prediction", "class_frame_prediction"):
        assert changed[name] == dataclasses.replace(TASKS[name], first=3)  # type: ignore[arg-type]
    assert _all_tasks(None) == list(TASKS.values())


def test_frames_side_by_side() -> None:
    video = torch.arange(9.0).view(1, 9, 1, 1).expand(3, 9, 2, 30) / 10
    assert _shown(9) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert _shown(16) == [0, 2, 4, 6, 9, 11, 13, 15]
    assert _shown(1) == [0]
    strip = _strip(video, [0, 4, 8])
    assert strip.shape == (2, 92, 3)
    row = strip[0, :, 0].tolist()
    assert row == pytest.approx([0.0] * 30 + [1.0] + [0.4] * 30 + [1.0] + [0.8] * 30)


def test_the_rendered_scene_at_any_size() -> None:
    video = synthetic_video(ClipGeometry(5, 16, 24, (2, 4, 6), True))
    assert video.shape == (1, 3, 5, 16, 24)
    expected = torch.from_numpy(demo_clip(5, 24))[:, 4:20].permute(3, 0, 1, 2).float() / 255
    assert torch.equal(video[0], expected)


def test_bad_input(fails: Callable, models: Any, clip: str, tmp_path: Path) -> None:
    sheet = ("--sheet", tmp_path / "sheet.png")
    assert "--sheet PNG in place of -o" in fails(*ALL, "-o", tmp_path / "x.mp4", *models.both)
    assert "either -o VIDEO or --sheet" in fails(*ALL, *models.both)
    both = ("-o", tmp_path / "x.mp4", *sheet)
    assert "either -o VIDEO or --sheet" in fails(*ALL, *both, *models.both)
    line = fails(*ALL, *sheet, *models.both, "--frames", "20")
    assert "--frames: a sheet shows one clip" in line
    assert "--class-id: expected 0 to 1, got 2" in fails(
        *ALL, *sheet, *models.both, "--class-id", "2"
    )
    assert "schedule: expected one of" in fails(*ALL, *sheet, *models.both, "--schedule", "spiral")
    assert "too short" in fails(*ALL, *sheet, *models.both, "--video", clip, "--start", "25")
    assert not list(tmp_path.iterdir())
