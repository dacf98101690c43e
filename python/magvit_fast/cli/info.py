"""`magvit-fast info`: what was built, what is used."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from magvit_fast.cli.runtime import Outcome, running
from magvit_fast.info import info

HELP = "Show what was built and what is used: instruction sets, OpenMP, CUDA, versions."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(args: argparse.Namespace) -> Outcome:
    with running(args):
        facts = info()
    return Outcome(asdict(facts), str(facts))
