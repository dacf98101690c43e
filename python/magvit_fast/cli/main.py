"""`magvit-fast`: reads the command line, runs one command, shows its result or one line of error.

The parser is argparse and not a library that reads dataclasses: a wrong option must give one line on
stderr, and `magvit-fast info` must work where no extra is installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch

from magvit_fast import __version__
from magvit_fast.cli import (
    bench,
    demo,
    detokenize,
    evaluate,
    generate,
    info,
    tokenize,
    train,
)
from magvit_fast.cli.runtime import Outcome, add_runtime_options, to_json
from magvit_fast.errors import MagvitFastError


class Command(Protocol):
    """What a command's module provides."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> Outcome | None: ...


COMMANDS: dict[str, Command] = {
    "info": info,
    "demo": demo,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "generate": generate,
    "train": train,
    "evaluate": evaluate,
    "bench": bench,
}
# Trouble with input, files or the machine: the message says all. Anything else is a bug of ours.
_EXPECTED = (MagvitFastError, ValueError, TypeError, NotImplementedError, OSError, MemoryError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="magvit-fast", description="Tokenize, rebuild and continue videos.")
    parser.add_argument("--version", action="version", version=f"magvit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        add_runtime_options(sub)
        output = sub.add_argument_group("output")
        output.add_argument("--json", action="store_true", help="print the result as JSON")
        output.add_argument("--debug", action="store_true", help="print a traceback on errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit status: 0, 1 (error), 2 (usage), 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)
    try:
        with _TerminationRaises():
            outcome = COMMANDS[args.command].run(args)
        if outcome is not None:
            _show(outcome, as_json=args.json)
    except KeyboardInterrupt:
        return _complain("interrupted; no unfinished file was left behind", status=130)
    except BrokenPipeError:  # `magvit-fast ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        return _complain(_one_line(error))
    return 0


def _show(outcome: Outcome, *, as_json: bool) -> None:
    print(to_json(outcome.facts) if as_json else outcome.text)
    sys.stdout.flush()


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in message:
        return f"out of memory ({message}); take a smaller --size or fewer frames"
    if isinstance(error, _EXPECTED):
        return message
    return f"unexpected {type(error).__name__}: {message}; --debug shows where"


def _complain(message: str, *, status: int = 1) -> int:
    print(f"magvit-fast: error: {message}", file=sys.stderr)
    return status


class _TerminationRaises:
    """SIGTERM ends the command the way Ctrl-C does: temporary files are removed on the way out."""

    def __enter__(self) -> None:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
