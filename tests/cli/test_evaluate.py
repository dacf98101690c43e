"""`evaluate` with networks, tasks and protocols: numbers that follow from the library, and bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import magvit_fast as mf
from magvit_fast.cli.clips import iter_clips
from magvit_fast.cli.main import main
from magvit_fast.cli.runtime import several_processes
from magvit_fast.data.synthetic import render_clip
from magvit_fast.data.tokens import TokenHeader, write_index
from magvit_fast.data.video import read_video, write_video
from magvit_fast.metrics import (
    C3DLogits,
    VideoFeatures,
    central_crop,
    clip_requests,
    frechet_distance,
    get_protocol,
    inception_score,
    load_lpips,
    load_network,
    psnr,
    resize_bilinear,
)
from magvit_fast.metrics.lpips import Vgg16
from magvit_fast.models import MagvitV2Tokenizer, MaskedTransformer
from magvit_fast.tasks import get_task

FEW = ("--steps", "2", "--json")


class _Features(nn.Module):
    """A few means of colors and motion."""

    def forward(self, x: Tensor) -> Tensor:
        steps = (x[:, :, 1:] - x[:, :, :-1]).abs().mean([2, 3, 4])
        return torch.cat([x.mean([2, 3, 4]), x.square().mean([2, 3, 4]), steps], dim=1)


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("networks") / "features.pt"
    torch.jit.script(_Features()).save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two short scenes each, 24 x 32, 12 to 18 frames, and one that is too short."""
    root = tmp_path_factory.mktemp("set")
    for number, frames in enumerate((12, 14, 16, 18, 4)):
        pixels = torch.from_numpy(render_clip(number, frames, 32))[:, 4:28]
        name = root / ("ball" if number < 2 else "box") / f"{number}.mp4"
        name.parent.mkdir(exist_ok=True)
        write_video(name, pixels.permute(3, 0, 1, 2), 12.0)
    return root


# --- reconstruction -------------------------------------------------------------------------------


def test_distances_of_reconstructions(
    cli: Callable, models: Any, folder: Path, network: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_file(Vgg16().state_dict(), tmp_path / "vgg.safetensors")
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}": torch.rand(width) for i, width in enumerate(widths)}
    save_file(linear, tmp_path / "linear.safetensors")
    lpips = (tmp_path / "vgg.safetensors", tmp_path / "linear.safetensors")
    files = [folder / "ball" / "0.mp4", folder / "box" / "3.mp4"]
    result = cli(
        "evaluate", *files, "--tokenizer", models.tokenizer, "--frames", "9", "--size", "16",
        "--fvd-features", network, "--is-features", network, "--lpips", *lpips, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [9, 16, 16]
    clips = [clip for file in files for clip in iter_clips(file, (9, 16, 16))]
    assert [row["clips"] for row in facts["files"]] == [1, 2]
    tokenizer = MagvitV2Tokenizer.from_pretrained(models.tokenizer)
    with torch.inference_mode():
        rebuilt = [tokenizer.decode(tokenizer.encode(clip)) for clip in clips]
    real, made = torch.cat(clips), torch.cat(rebuilt)
    features = VideoFeatures(load_network(network))
    expected = frechet_distance(features(real), features(made))
    assert facts["fvd"] == pytest.approx(expected, rel=1e-4)
    logits = C3DLogits(load_network(network))(made)
    assert facts["inception_score"] == pytest.approx(inception_score(logits), rel=1e-4)
    distance = load_lpips(*lpips)(made, real)
    assert facts["files"][1]["lpips"] == pytest.approx(float(distance[1:].mean()), rel=1e-4)
    assert facts["mean"]["lpips"] == pytest.approx(float(distance.mean()), rel=1e-4)


def test_a_folder_and_the_table(cli: Callable, models: Any, folder: Path, network: str) -> None:
    result = cli(
        "evaluate", folder / "ball", "--tokenizer", models.tokenizer, "--frames", "9", "--size",
        "16", "--fvd-features", network,
    )  # fmt: skip
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [
        str(folder / "ball" / f"{i}.mp4") for i in range(2)
    ]
    assert any(line.startswith("FVD: ") for line in lines)


# --- generation -----------------------------------------------------------------------------------


def _pair(models: Any) -> tuple[MagvitV2Tokenizer, MaskedTransformer]:
    return (
        MagvitV2Tokenizer.from_pretrained(models.tokenizer),
        MaskedTransformer.from_pretrained(models.transformer),
    )


def test_a_task_without_a_protocol(
    cli: Callable, models: Any, folder: Path, network: str, tmp_path: Path
) -> None:
    """One window a file, every sample compared with its own clip."""
    written = tmp_path / "scores.json"
    words = ("evaluate", folder, *models.both, "--task", "frame_interpolation", *FEW, "-o", written)
    result = cli(*words, "--fvd-features", network)
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert json.loads(written.read_text()) == facts
    assert (facts["samples"], facts["real_clips"], facts["files_used"]) == (4, 4, 4)
    assert facts["differs_from_protocol"] == []
    # the clips, made again by hand in the protocol's order
    files = sorted(folder.rglob("*.mp4"))
    plain = dataclasses.replace(get_protocol("ssv2"), frames=9, windows=1, generated=4, repeats=1)
    lengths = [12, 14, 16, 18, 4]
    order = [files[r.video] for r in clip_requests(plain, lengths)]
    real = torch.stack([read_video(file, frames=9, size=16) for file in order])
    tokenizer, transformer = _pair(models)
    made = mf.generate(
        tokenizer, transformer, task="frame_interpolation", video=real, steps=2, seed=0
    )
    assert facts["psnr"] == pytest.approx(float(psnr(made, real).mean()), rel=1e-4)
    features = VideoFeatures(load_network(network))
    expected = frechet_distance(features(real), features(made))
    assert facts["fvd"] == pytest.approx(expected, rel=1e-4)


def test_a_protocol_with_repeats_and_best_of_trials(
    cli: Callable, models: Any, folder: Path, network: str
) -> None:
    words = ("evaluate", folder, *models.both, "--protocol", "bair-standard", "--steps", "2")
    small = ("--generated", "8", "--repeats", "2", "--fvd-features", network, "--batch", "4")
    result = cli(*words, *small, "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert (facts["samples"], facts["real_clips"], facts["repeats"]) == (16, 4, 2)
    assert (facts["schedule"], facts["choice_temperature"]) == ("exp", 400.0)
    assert facts["best_trial_counts_for"] == ["psnr", "ssim"]
    assert len(facts["fvd_folds"]) == 2
    assert facts["fvd"] == pytest.approx(sum(facts["fvd_folds"]) / 2)
    differs = " ".join(facts["differs_from_protocol"])
    assert facts["trials_per_clip"] == [2, 2]
    for part in (
        "8 in place of 25600",
        "trials a clip: 2 in place of 100",
        "repeats: 2",
        "frames: 9",
        "16x16 in place of 64x64",
    ):
        assert part in differs
    # the best of two trials in each repeat, made again by hand
    tokenizer, transformer = _pair(models)
    task = dataclasses.replace(get_task("frame_prediction"), first=1)  # type: ignore[call-arg]
    files = sorted(folder.rglob("*.mp4"))[:4]
    protocol = dataclasses.replace(get_protocol("bair-standard"), frames=9)
    requests = list(clip_requests(protocol, [12, 14, 16, 18], generated=8, repeats=2))
    best: dict[tuple[int, int], float] = {}
    for number in range(4):
        batch = requests[4 * number : 4 * number + 4]
        real = torch.stack([read_video(files[r.video], frames=9, size=16) for r in batch])
        made = mf.generate(
            tokenizer, transformer, task=task, video=real, steps=2, schedule="exp",
            choice_temperature=400.0, seed=1_000_003 * number,
        )  # fmt: skip
        for r, value in zip(batch, psnr(made, real).tolist(), strict=True):
            best[r.fold, r.clip] = max(value, best.get((r.fold, r.clip), 0.0))
    folds = [sum(v for (fold, _), v in best.items() if fold == f) / 4 for f in range(2)]
    assert facts["psnr_folds"] == pytest.approx(folds, rel=1e-4)
    assert facts["psnr"] == pytest.approx(sum(folds) / 2, rel=1e-4)
    text = cli(*words, *small).out
    for part in ("protocol bair-standard", "± ", "over 2 repeats", "of 2 counts for psnr, ssim"):
        assert part in text
    assert facts["networks"] == {"fvd": network}
    assert network in text


def test_a_papers_settings_go_before_those_of_the_protocol(
    cli: Callable, models: Any, folder: Path
) -> None:
    words = ("evaluate", folder, *models.both, "--protocol", "bair-debiased", "--steps", "2")
    few = ("--generated", "4", "--repeats", "1", "--settings", "magvit-v2-image-256-guided")
    result = cli(*words, *few, "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert (facts["steps"], facts["choice_temperature"]) == (2, 15.0)
    assert facts["guidance"]["scale"] > 0  # a schedule of guidance, spelled out
    assert any(line.startswith("guidance: ") for line in facts["differs_from_protocol"])


def test_classes_are_those_of_the_real_clips(
    cli: Callable, models: Any, folder: Path, network: str
) -> None:
    words = ("evaluate", folder, *models.both, "--protocol", "ucf101-class-generation", *FEW)
    result = cli(*words, "--generated", "6", "--repeats", "1", "--is-features", network)
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["real_clips"] == 6  # random windows: every one is another
    assert facts["inception_score"] >= 1.0
    assert "psnr" not in facts


@pytest.fixture
def seen_classes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The classes that samples were asked for."""
    seen: list[int] = []
    generate = mf.generate

    def watched(*models: Any, **options: Any) -> Tensor:
        seen.extend(options["class_id"] or ())
        return generate(*models, **options)

    monkeypatch.setattr(mf, "generate", watched)
    return seen


@pytest.mark.parametrize("kind", ["text", "tokens", "videos"])
def test_a_part_of_the_classes_keeps_its_numbers(
    cli: Callable, models: Any, folder: Path, tmp_path: Path, seen_classes: list[int], kind: str
) -> None:
    """Alone, the folder box would be class 0."""
    source = tmp_path / "classes"
    if kind == "text":
        source.write_text("ball\nbox\n\n")
    elif kind == "tokens":
        write_index(
            source, TokenHeader("", 6, (1, 1, 1), (1, 8, 8)), [], class_names=("ball", "box")
        )
    else:
        source = folder
    words = ("evaluate", folder / "box", *models.both, "--task", "class_frame_prediction", *FEW)
    result = cli(*words, "--classes", source)
    assert result.status == 0, result.err
    assert seen_classes == [1, 1]


def test_classes_that_are_not_the_models(
    fails: Callable, models: Any, folder: Path, tmp_path: Path
) -> None:
    words = ("evaluate", folder / "box", *models.both, "--task")
    line = fails(*words, "class_frame_prediction")
    assert "the transformer's 2 classes, got 1 (the folders of the files)" in line
    names = tmp_path / "names.txt"
    for text, message in (
        ("ball\nbox\ncat", "the names of the transformer's 2 classes, got 3"),
        ("ball\ncat", "its folder is the name of no class that"),
        ("box\nbox", "names a class twice"),
        ("", "names no classes"),
    ):
        names.write_text(text)
        assert message in fails(*words, "class_frame_prediction", "--classes", names)
    line = fails(*words, "class_frame_prediction", "--classes", tmp_path / "none")
    assert "none: cannot be read" in line
    assert "no classes; leave" in fails(*words, "frame_prediction", "--classes", names)
    assert "no classes; leave" in fails("evaluate", folder, *models.both, "--classes", names)


def test_compared_at_another_size(
    cli: Callable, models: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinetics-600: made large, compared small, from all windows and crops."""
    protocol = get_protocol("k600-frame-prediction")
    small = dataclasses.replace(protocol, size=16, metric_size=12)
    monkeypatch.setattr("magvit_fast.cli.generation_quality.get_protocol", lambda name: small)
    words = ("evaluate", folder, *models.both, "--protocol", protocol.name, *FEW)
    result = cli(*words, "--generated", "24", "--repeats", "1")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [9, 12, 12]
    assert facts["real_clips"] == 24  # 4 files x 2 windows x 3 crops


def test_the_smaller_picture_is_a_central_crop_and_a_filtered_resize() -> None:
    from magvit_fast.cli.generation_quality import _compared

    class Job:
        geometry = mf.tasks.ClipGeometry(9, 16, 24, (3, 4, 6), True)
        protocol = dataclasses.replace(get_protocol("k600-frame-prediction"), metric_size=8)

    video = torch.rand(1, 3, 2, 16, 24)
    expected = resize_bilinear(central_crop(video, (16, 16)), (8, 8), corners="half_pixel")
    torch.testing.assert_close(_compared(video, Job()), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["outpainting_dynamic", "class_frame_prediction"])
def test_a_first_generation_pair(
    cli: Callable, first_generation: list[str], folder: Path, task: str
) -> None:
    result = cli("evaluate", folder, *first_generation, "--task", task, *FEW, "--clips", "2")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["shape"] == [8, 16, 16]
    assert facts["samples"] == 8


def _in_fork(words: list[str], folder: str) -> None:
    """One of two processes, which must forget that its parent was alone; stdout goes to a file."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    place = Path(folder) / str(torch.distributed.get_rank())
    with place.open("w") as out, contextlib.redirect_stdout(out):
        assert main(words) == 0


def _forked(words: list[str], folder: Path) -> str:
    from accelerate import debug_launcher

    debug_launcher(_in_fork, (words, str(folder)), num_processes=2)
    return "".join((folder / rank).read_text() for rank in "01")


def _torchrun(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", "-m", "magvit_fast.cli.main", *words),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("launch", [_forked, pytest.param(_torchrun, marks=pytest.mark.slow)])
def test_in_two_processes(
    cli: Callable, models: Any, folder: Path, network: str, tmp_path: Path,
    launch: Callable[[list[str], Path], str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The numbers of one process, written once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # unset, accelerate sets it with a warning
    words = [
        "evaluate", str(folder), *models.both, "--task", "frame_prediction", *FEW, "--batch", "1",
        "--fvd-features", network, "--device", "cpu",
    ]  # fmt: skip
    facts, expected = json.loads(launch(words, tmp_path)), json.loads(cli(*words).out)
    assert facts["samples"] == 4
    for name, value in expected.items():
        assert facts[name] == (
            pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
        ), name


def test_processes_wait_for_each_other_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shares of the files take hours, and differ; the slowest must not cost the others' work."""
    made: list[dict[str, Any]] = []

    class State:
        process_index, num_processes = 1, 2

        def __init__(self, **options: Any) -> None:
            made.append(options)

        def destroy_process_group(self) -> None:
            made.append({})

    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with several_processes(torch.device("cpu")) as processes:
        assert (processes.rank, processes.count) == (1, 2)
    assert made[0]["timeout"] > timedelta(days=1)
    assert len(made) == 2


# --- bad input ------------------------------------------------------------------------------------


def test_networks_that_are_missing_or_foreign(
    fails: Callable, models: Any, clip: str, folder: Path, network: str, tmp_path: Path
) -> None:
    words = ("evaluate", clip, "--tokenizer", models.tokenizer, "--frames", "9", "--size", "16")
    assert "none.pt: no such file" in fails(*words, "--fvd-features", tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    line = fails(*words, "--fvd-features", tmp_path / "weights.pt")
    assert "is no TorchScript network" in line
    images_only = tmp_path / "images.pt"
    torch.jit.script(nn.Sequential(nn.Flatten(2), nn.Linear(7, 2))).save(str(images_only))
    line = fails(*words, "--fvd-features", images_only)
    assert f"--fvd-features {images_only}" in line
    assert "cannot be used as such a network" in line
    assert "--is-offset: expected --is-features" in fails(*words, "--is-offset", clip)
    line = fails(*words, "--is-features", network, "--is-offset", clip)
    assert "no safetensors file with an array 'offset'" in line
    assert "no such file" in fails(*words, "--lpips", tmp_path / "a", tmp_path / "b")


def test_too_few_frames_for_the_video_distance(
    fails: Callable, models: Any, clip: str, network: str
) -> None:
    line = fails(
        "evaluate", clip, "--tokenizer", models.tokenizer, "--frames", "5", "--size", "16",
        "--fvd-features", network,
    )  # fmt: skip
    assert "at least 9 frames, these have 5" in line


def test_tasks_and_protocols_that_do_not_fit(
    fails: Callable, models: Any, folder: Path, network: str, tmp_path: Path
) -> None:
    words = ("evaluate", folder, *models.both)
    assert "--task: protocol bair-standard is for frame_prediction" in fails(
        *words, "--protocol", "bair-standard", "--task", "inpainting_central"
    )
    assert "--task: protocol ssv2 needs one of" in fails(*words, "--protocol", "ssv2")
    assert "--clips: protocol ssv2 says which" in fails(
        *words, "--protocol", "ssv2", "--task", "inpainting_central", "--clips", "2"
    )
    assert "only distributions can be compared" in fails(*words, "--task", "class_generation")
    assert "invalid choice" in fails(*words, "--protocol", "bair", status=2)
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "v.mp4").symlink_to(folder / "ball" / "0.mp4")
    line = fails("evaluate", tmp_path, *models.both, "--task", "class_frame_prediction")
    assert "the transformer's 2 classes, got 3 (the folders of the files)" in line
    for task in (("--task", "frame_prediction"), ("--prediction",)):
        line = fails(*words, *task, "--frames", "5")
        assert "--frames: the models make clips of 9 frames, got 5; leave it out" in line
        line = fails(*words, *task, "--size", "16x24")
        assert "--size: the models make clips of 16x16 pixels, got 16x24; leave it out" in line
    line = fails("evaluate", folder / "box" / "4.mp4", *models.both, "--task", "frame_prediction")
    assert "too short: a clip takes 9 frames, found 4" in line
    (tmp_path / "empty").mkdir()
    assert "holds no video file" in fails("evaluate", tmp_path / "empty", *models.both)
