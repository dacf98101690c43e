"""Benchmarks: shapes in problems/*.toml, one bench_<op>.py an op, measured results in results/."""

from __future__ import annotations
