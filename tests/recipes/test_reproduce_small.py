"""The small-scale comparisons: plans that load, jobs that run and go on after a kill, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.reproduce_small import jobs
from recipes.reproduce_small.__main__ import main
from recipes.reproduce_small.clips import Clips
from recipes.reproduce_small.costs import decoding_costs
from recipes.reproduce_small.features import RandomVideoFeatures, distance
from recipes.reproduce_small.jobs import Runner, begin_calmly, codebook_from_clips, to_toml
from recipes.reproduce_small.measure import psnr_where, task_of
from recipes.reproduce_small.plan import (
    Claim,
    Comparison,
    Job,
    Plan,
    merged,
    plan_file,
    tomllib,
)
from recipes.reproduce_small.report import render, report_of, slug, write_report

from magvit_fast.data.video import write_video
from magvit_fast.models import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.training.config import TokenizerTraining, TransformerTraining, load_recipe
from magvit_fast.training.maskvit_config import MaskViTTraining
from magvit_fast.training.tokenizer_loop import TokenizerTrainer

BUDGETS = ("small", "large")
# Two steps of each training, on a few clips, with the plan's own shapes but for widths.
TINY = {
    "tokenizer": {
        "recipe": {
            "run": {"steps": 2, "batch_size": 2, "mixed_precision": "no"},
            "model": {"filters": 4},
        }
    },
    "transformer": {
        "recipe": {
            "run": {"steps": 2, "batch_size": 2, "mixed_precision": "no"},
            "data": {"scenes": 4},
            "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16},
        },
        "evaluate": {"decoding": {"steps": 2}},
    },
    "maskvit": {
        "recipe": {
            "run": {"steps": 2, "batch_size": 2, "mixed_precision": "no"},
            "data": {"scenes": 4},
            "model": {"hidden_size": 16, "num_blocks": 1, "num_heads": 2, "mlp_size": 16},
        },
        "evaluate": {"decoding": {"steps": 2}},
    },
    "decoding_cost": {"evaluate": {"grids": [[2, 2, 2]], "repeats": 1, "steps": 3}},
    "attention_cost": {"evaluate": {"repeats": 1}},
}
SPECIALISTS = {
    "interpolation only": "frame_interpolation.frechet",
    "central outpainting only": "outpainting_central.frechet",
    "central inpainting only": "inpainting_central.frechet",
}
KINDS = {
    "tokenizer": TokenizerTraining,
    "transformer": TransformerTraining,
    "maskvit": MaskViTTraining,
}


def tiny_plan() -> Plan:
    plan = Plan.read(plan_file("small"))
    models = {}
    for name, model in plan.models.items():
        changed = merged(model, TINY[model["kind"]])
        if "autoregressive" in name:  # it has no number of steps to choose
            changed["evaluate"].pop("decoding")
        models[name] = changed
    return Plan("tiny", 1, plan.scenes, 4, models, plan.comparisons)


# ---- plans ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_recipe_of_a_plan_is_valid(budget: str, tmp_path: Path) -> None:
    for job in Plan.read(plan_file(budget)).jobs(seeds=1):
        if job.kind not in KINDS:
            continue
        paths: dict[str, Any] = {"run": {"output": "x"}, "data": {"source": "scenes"}}
        if job.kind != "tokenizer":
            paths |= {"tokenizer": "x"}
        if job.kind == "transformer":
            paths |= {"model": {"num_classes": 4}}
        file = tmp_path / f"{job.name}.toml"
        file.write_text(to_toml(merged(job.recipe, paths)))
        recipe = load_recipe(file, KINDS[job.kind])
        assert recipe.run.steps > 1
        assert recipe.run.seed == job.seed


@pytest.mark.parametrize("budget", BUDGETS)
def test_jobs_come_after_what_they_need_and_seed_by_seed(budget: str) -> None:
    plan = Plan.read(plan_file(budget))
    jobs = plan.jobs()
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:place])
    shared = {j.model for j in jobs if plan.models[j.model].get("seeds") == 1}
    seeds = [job.seed for job in jobs if job.model not in shared]
    assert seeds == sorted(seeds)
    assert max(seeds) + 1 == plan.seeds
    wanted = {m for c in plan.comparisons.values() for m in c.variants.values()}
    assert wanted <= {job.model for job in jobs}


def test_some_comparisons_bring_their_tokenizers_and_no_others() -> None:
    jobs = Plan.read(plan_file("small")).jobs(["condition"], 1)
    assert {job.model for job in jobs} == {"image-trunk", "magvit", "commit", "latent", "prefix"}


def test_plans_with_mistakes_are_refused(tmp_path: Path) -> None:
    def read(text: str) -> None:
        path = tmp_path / "plan.toml"
        path.write_text(f'seeds = 1\nscenes = "scenes"\nheld_out = 2\n{text}')
        Plan.read(path)

    with pytest.raises(ValueError, match=r"models\.a\.kind: expected"):
        read('[models.a]\nkind = "tokeniser"\n[comparisons]')
    with pytest.raises(ValueError, match=r"models\.a\.tokenizer: no model 'b'"):
        read('[models.a]\nkind = "transformer"\ntokenizer = "b"\n[comparisons]')
    with pytest.raises(ValueError, match=r"comparisons\.c\.x: no model 'b'"):
        read(
            '[models.a]\nkind = "tokenizer"\n'
            '[comparisons.c]\ntitle = ""\nvariants = { x = "b" }\nmetrics = {}'
        )
    path = tmp_path / "plan.toml"
    path.write_text('seeds = 1\nscenes = "dreams"\nheld_out = 2\n[models]\n[comparisons]')
    with pytest.raises(ValueError, match=r"scenes: expected one of \['calm-scenes', 'scenes'\]"):
        Plan.read(path)
    with pytest.raises(ValueError, match="budget: expected one of"):
        plan_file("huge")
    with pytest.raises(ValueError, match="only: expected some of"):
        Plan.read(plan_file("small")).jobs(["speed"])


# ---- jobs ----------------------------------------------------------------------------------------
def run_tiny(only: list[str], work: Path) -> dict[str, Any]:
    plan = tiny_plan()
    runner = Runner(work, Clips(None, work), plan.held_out)
    jobs = plan.jobs(only)
    for job in jobs:
        runner.run(job)
    report = report_of(plan, jobs, runner.result, "rendered scenes")
    assert not report["jobs_missing"]
    assert render(report)
    return {c["name"]: c for c in report["comparisons"]}


def test_conditions_tasks_and_both_ways_of_decoding(tmp_path: Path) -> None:
    found = run_tiny(["condition", "tasks", "decoding", "decoding-speed"], tmp_path)
    assert [r["variant"] for r in found["condition"]["rows"]] == [
        "COMMIT",
        "latent masking",
        "prefix",
    ]
    for name in ("condition", "tasks", "decoding"):
        for row in found[name]["rows"]:
            missing = set(found[name]["metrics"]) - set(row["cells"])
            if name == "tasks" and row["variant"] in SPECIALISTS:  # measured on four of the tasks
                assert SPECIALISTS[row["variant"]] in row["cells"]
                assert len(missing) == 8
            else:
                assert not missing, row["variant"]
    # Copying is the same for every model: it does not depend on any.
    copies = {r["cells"]["frame_prediction.psnr_copy"]["mean"] for r in found["condition"]["rows"]}
    assert len(copies) == 1


def test_vocabularies_and_causality(tmp_path: Path) -> None:
    only = ["causality", "causality-generation"]
    found = run_tiny(only, tmp_path)
    tokens = [
        r["cells"]["reconstruction.tokens_per_clip"]["mean"] for r in found["causality"]["rows"]
    ]
    assert tokens == [80, 64]
    assert len(found["causality-generation"]["rows"]) == 2


def test_windows_and_full_attention(tmp_path: Path) -> None:
    found = run_tiny(["attention"], tmp_path)
    assert len(found["attention"]["rows"]) == 2
    for row in found["attention"]["rows"]:
        assert set(row["cells"]) == set(found["attention"]["metrics"])


@pytest.mark.slow
def test_the_whole_plan_at_two_steps_each(tmp_path: Path) -> None:
    found = run_tiny([], tmp_path)
    assert set(found) == set(Plan.read(plan_file("small")).comparisons)


def test_a_killed_training_goes_on_and_a_done_job_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_plan().jobs(["tokenizer"])[0]
    changes = {"run": {"steps": 4, "checkpoint_every": 2}}
    job = Job(**{**vars(job), "recipe": merged(job.recipe, changes)})

    def runner(name: str) -> Runner:
        return Runner(tmp_path / name, Clips(None, tmp_path / name), 2)

    whole = runner("whole").run(job)
    steps = 0
    finish = TokenizerTrainer.finish_step

    def stop_at_the_third(self: TokenizerTrainer) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return finish(self)

    monkeypatch.setattr(TokenizerTrainer, "finish_step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        runner("cut").run(job)
    assert runner("cut").result(job.name) is None
    again = runner("cut").run(job)
    assert steps == 5  # two before the kill, the third in vain, then the third and the fourth
    assert again["scores"] == whole["scores"]
    assert whole["training_cpu_seconds"] > 0
    assert again["training_cpu_seconds"] is None  # of a part of the training it would mislead
    assert runner("cut").run(job) == again
    assert steps == 5


def test_the_command_runs_reports_and_reports_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny_plan()
    monkeypatch.setattr(Plan, "read", lambda path: plan)
    threads = torch.get_num_threads()
    options = [
        "--only",
        "decoding-speed",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "r.json"),
    ]
    try:
        main(options)
        first = (tmp_path / "r.json").read_text()
        assert "decoding-cost-0:" in capsys.readouterr().out
        main([*options, "--report-only"])
        assert "decoding-cost-0:" not in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(first)
    assert (tmp_path / "r.md").read_text().startswith("# ")
    with pytest.raises(SystemExit):
        main(["--budget", "huge"])


def test_the_user_s_videos_are_split_classified_and_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_CALIBRATION_CLIPS", 3)  # decoding files is what takes time here
    monkeypatch.setattr(jobs, "_CODEBOOK_CLIPS", 3)
    for i in range(6):
        video = torch.full((3, 18, 16, 16), 40 * i, dtype=torch.uint8)
        (tmp_path / "videos" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "videos" / f"class{i % 2}" / f"{i}.mp4", video, 8.0)
    clips = Clips(tmp_path / "videos", tmp_path / "work")
    assert clips.class_names == ("class0", "class1")
    train, held_out = (
        (tmp_path / "work" / f"{name}.txt").read_text().split() for name in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (5, 1)
    assert not set(train) & set(held_out)
    taken = clips.held_out(3, 16, 16)
    assert taken.video.shape == (3, 3, 16, 16, 16)
    assert torch.equal(clips.held_out(3, 8, 16).video, taken.video[:, :, :8])
    assert clips.data()["path"].endswith("train.txt")
    plan, runner = tiny_plan(), Runner(tmp_path / "work", clips, 2)
    plan.models["commit"]["evaluate"]["tasks"] = ["frame_prediction"]
    for job in plan.jobs(["decoding"]):
        if job.model != "autoregressive":
            scores = runner.run(job)["scores"]
    assert scores["frame_prediction"]["psnr_copy"] > 30  # these videos stand still
    with pytest.raises(ValueError, match="at least 2 files"):
        Clips(tmp_path / "work", tmp_path / "other")


# ---- parts ---------------------------------------------------------------------------------------
def test_distances_rise_with_what_is_wrong() -> None:
    clips = Clips(None, Path("unused"))
    real, others = clips.held_out(32, 16, 16).video, clips.reference(64, 16, 16)
    features = RandomVideoFeatures()
    features.calibrate(others)
    same, found = distance(features, real, real), distance(features, others[:32], real)
    frozen = real[:, :, :1].expand_as(real)
    shuffled = real[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    blurred = torch.nn.functional.avg_pool3d(real, (1, 3, 3), 1, (0, 1, 1))
    assert same == pytest.approx(0, abs=1e-6)
    assert distance(features, frozen, real) > 2 * found
    assert distance(features, shuffled, real) > 2 * found
    assert distance(features, blurred, real) > same


def test_psnr_is_over_the_chosen_pixels() -> None:
    target = torch.zeros(2, 3, 4, 2, 2)
    wrong = target.clone()
    wrong[:, :, 2:] = 0.1
    where = torch.zeros(4, 2, 2, dtype=torch.bool)
    where[2:] = True
    assert psnr_where(wrong, target, where) == pytest.approx(20.0)
    assert psnr_where(wrong, target, torch.ones_like(where)) == pytest.approx(23.0103, abs=1e-3)


def test_given_frames_change_frame_prediction_alone() -> None:
    assert task_of("frame_prediction", 5).first == 5  # type: ignore[attr-defined]
    assert task_of("frame_prediction", 0).first is None  # type: ignore[attr-defined]
    assert task_of("frame_interpolation", 5).first == 1  # type: ignore[attr-defined]


def test_a_calm_start_is_gray_and_codes_come_from_clips() -> None:
    torch.manual_seed(0)
    config = MagvitV2Config(
        filters=4, channel_multipliers=(1, 2), temporal_downsample=(True,), num_res_blocks=1,
        num_bits=4, quantizer="vq", embedding_dim=3,
    )  # fmt: skip
    tokenizer = MagvitV2Tokenizer(config).eval()
    begin_calmly(tokenizer)
    video = torch.rand(20, 3, 5, 8, 8)
    codebook_from_clips(tokenizer, video)
    with torch.no_grad():
        output = tokenizer(video)
    assert output.reconstruction.mean().item() == pytest.approx(0.4, abs=0.1)
    assert output.ids.unique().numel() > 8


def test_passes_are_counted() -> None:
    model = {
        "hidden_size": 8, "num_layers": 1, "num_heads": 1, "mlp_size": 8,
        "num_subtokens": 1, "subtoken_size": 4,
    }  # fmt: skip
    (found,) = decoding_costs(grids=[[2, 3, 4]], steps=5, repeats=1, model=model).values()
    assert (found["tokens"], found["passes_masked"], found["passes_autoregressive"]) == (24, 5, 24)
    assert found["ratio"] == found["seconds_autoregressive"] / found["seconds_masked"]


def test_tables_survive_toml(tmp_path: Path) -> None:
    table = {"a": 1, "b": 'x\\y "z"', "c": [1, 2], "d": {"e": 1e-5, "f": {"g": True}}, "h": -1.5}
    path = tmp_path / "t.toml"
    path.write_text(to_toml(table))
    assert tomllib.loads(path.read_text()) == table


# ---- the report ----------------------------------------------------------------------------------
def fixed_plan() -> Plan:
    def claim(better: str, worse: str) -> Claim:
        return Claim("t.fd", better, worse, True, "1 against 2", "too small")

    comparison = Comparison(
        "c", "A title", {"A": "a", "B": "b", "C": "c"}, {"t.fd": "FD", "cpu_seconds": "s"},
        (claim("A", "B"), claim("B", "A"), claim("A", "C")),
    )  # fmt: skip
    return Plan("fixed", 2, "scenes", 8, {}, {"c": comparison})


def fixed_results() -> dict[str, dict[str, Any]]:
    values = {"a-0": 1.0, "a-1": 2.0, "b-0": 11.0, "b-1": 13.0, "c-0": 2.5}
    return {
        name: {"model": name[0], "seed": int(name[2]), "steps": 7, "parameters": 9,
               "seconds": 4.0, "cpu_seconds": 3.0, "scores": {"t": {"fd": value}}}
        for name, value in values.items()
    }  # fmt: skip


def test_report_of_fixed_results(tmp_path: Path) -> None:
    results = fixed_results()
    jobs = [
        Job(n, n[0], "tokenizer", int(n[2])) for n in ("a-0", "a-1", "b-0", "b-1", "c-0", "c-1")
    ]
    report = report_of(fixed_plan(), jobs, results.get, "clips")
    (compared,) = report["comparisons"]
    cells = {row["variant"]: row["cells"]["t.fd"] for row in compared["rows"]}
    assert cells["A"] == {"mean": 1.5, "std": 0.5, "values": [1.0, 2.0]}
    assert cells["C"]["std"] == 0
    assert [c["verdict"] for c in compared["claims"]] == ["agrees", "disagrees", "undecided"]
    assert report["jobs_missing"] == ["c-1"]
    assert (report["seconds"], report["cpu_seconds"]) == (20.0, 15.0)

    text = write_report(report, tmp_path / "deep" / "report.json")
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == report
    assert (tmp_path / "deep" / "report.md").read_text() == text
    assert "| A | 1.5 ± 0.5 | 3 ± 0 | 2 |" in text
    assert "| C | 2.5 | 3 | 1 |" in text
    assert "**disagrees**: B before A in FD: 12 against 1.5" in text
    assert "Likely why not: too small." in text
    assert "Not run: c-1." in text
    assert "not the published FVD" in text
    assert slug({"cpu": "AMD EPYC (1)", "threads": 2}) == "amd-epyc-1-2-threads"


def test_comparisons_without_results_are_left_out() -> None:
    report = report_of(fixed_plan(), [Job("a-0", "a", "tokenizer", 0)], lambda name: None, "clips")
    assert report["comparisons"] == []
    assert "Not run: a-0." in render(report)
