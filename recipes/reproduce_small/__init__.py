"""The papers' comparisons at a small scale: train, measure, report. See README.md."""

from __future__ import annotations
