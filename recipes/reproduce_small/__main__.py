"""python -m recipes.reproduce_small: run what is not done yet, then write the report."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from recipes.reproduce_small.clips import Clips
from recipes.reproduce_small.jobs import Runner
from recipes.reproduce_small.plan import Plan, plan_file
from recipes.reproduce_small.report import report_of, slug, write_report

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.reproduce_small",
        description="The papers' comparisons at a small scale. Stopped? The same command goes on.",
    )
    parser.add_argument("--budget", default="small", help="a plan: small, large (default: small)")
    parser.add_argument("--only", default="", help="comparisons, separated by commas")
    parser.add_argument("--seeds", type=int, help="how many (default: the plan's)")
    parser.add_argument(
        "--videos", type=Path, help="a folder of videos in place of rendered scenes"
    )
    parser.add_argument("--work", type=Path, help="models and results (default: runs/...)")
    parser.add_argument(
        "--out", type=Path, help="report NAME.json and NAME.md (benchmarks/results/)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="start no further job after this long")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        plan = Plan.read(plan_file(args.budget))
        work = args.work or ROOT / "runs" / f"reproduce-small-{args.budget}"
        clips = Clips(args.videos, work, plan.scenes)
        only = [name for name in args.only.split(",") if name]
        jobs = plan.jobs(only, args.seeds)
    except ValueError as error:
        parser.error(str(error))
    runner = Runner(work, clips, plan.held_out)
    began = time.monotonic()
    for number, job in enumerate(jobs):
        late = args.minutes is not None and time.monotonic() - began > 60 * args.minutes
        if runner.result(job.name) is None and (args.report_only or late):
            continue
        fresh = runner.result(job.name) is None
        result = runner.run(job)
        if fresh:
            took = f"{result['seconds']:.0f} s ({result['cpu_seconds']:.0f} s of CPU)"
            print(f"{number + 1}/{len(jobs)} {job.name}: {took}", flush=True)
    report = report_of(plan, jobs, runner.result, clips.description)
    default = f"reproduce-small-{slug(report['machine'])}.json"
    out = args.out or ROOT / "benchmarks" / "results" / default
    print(write_report(report, out), flush=True)
    print(f"kept in {os.path.relpath(out)} and {os.path.relpath(out.with_suffix('.md'))}")


if __name__ == "__main__":
    main()
