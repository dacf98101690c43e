"""Options, errors and exit statuses that all commands share."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.cli import info as info_command
from magvit_fast.cli import main as main_module
from magvit_fast.cli.main import COMMANDS, main
from magvit_fast.cli.progress import progress
from magvit_fast.cli.runtime import Outcome, pick_device, running, to_json


def test_info(cli: Callable) -> None:
    result = cli("info")
    assert result.status == 0
    assert result.err == ""
    assert "ISA in use" in result.out
    assert "OpenMP library" in result.out


def test_info_as_json_and_runtime_options(cli: Callable) -> None:
    threads = torch.get_num_threads()
    facts = json.loads(cli("info", "--json", "--threads", "1", "--impl", "reference").out)
    assert facts["version"] == mf.__version__
    assert facts["threads"] == 1
    assert facts["impl"] == "reference"
    assert torch.get_num_threads() == threads
    assert _native.current_impl() != "reference"


def test_version_and_help(cli: Callable) -> None:
    assert mf.__version__ in cli("--version").out
    for command in COMMANDS:
        text = cli(command, "--help").out
        assert "--device" in text
        assert "--json" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("info", "--fast"), "unrecognized arguments: --fast"),
        (("info", "--threads", "0"), "expected a number >= 1"),
        (("bench", "--size", "8x"), "expected N or HEIGHTxWIDTH, got '8x'"),
        (("bench", "--size", "0x8"), "expected positive sizes"),
        (("generate", "--task", "dance", "-o", "x.mp4"), "invalid choice: 'dance'"),
        (("tokenize", "x.mp4"), "arguments are required: -o/--output"),
    ],
)
def test_usage_errors_are_one_line(fails: Callable, words: tuple[str, ...], message: str) -> None:
    assert message in fails(*words, status=2)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "cpu:x"])
def test_bad_device(fails: Callable, device: str) -> None:
    assert "--device: " in fails("info", "--device", device)


def test_device_names() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def _raising(error: BaseException) -> Callable[[argparse.Namespace], Outcome]:
    def run(args: argparse.Namespace) -> Outcome:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x: expected a\n  tensor"), "magvit-fast: error: x: expected a tensor"),
        (mf.errors.FileFormatError("clip.mp4: is empty"), "magvit-fast: error: clip.mp4: is empty"),
        (OSError(28, "No space left on device", "x"), "No space left on device: 'x'"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (KeyError("oops"), "unexpected KeyError: 'oops'; --debug shows where"),
        (NotImplementedError(), "magvit-fast: error: NotImplementedError"),
    ],
)
def test_errors_are_one_line(
    fails: Callable, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(info_command, "run", _raising(error))
    assert message in fails("info")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_command, "run", _raising(KeyError("oops")))
    with pytest.raises(KeyError, match="oops"):
        main(["info", "--debug"])


def test_interrupt(fails: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_command, "run", _raising(KeyboardInterrupt()))
    assert "interrupted" in fails("info", status=130)


def test_termination_is_handled_and_the_handler_restored(
    fails: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate(args: argparse.Namespace) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal must end the command")

    monkeypatch.setattr(info_command, "run", terminate)
    assert "interrupted" in fails("info", status=130)
    assert signal.getsignal(signal.SIGTERM) is before


def test_json_is_strict() -> None:
    facts = {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": (1, None, "x")}}
    expected = {"a": None, "b": [None, 1.5], "c": {"d": [1, None, "x"]}}
    assert json.loads(to_json(facts)) == expected


def test_no_gradients_inside() -> None:
    args = argparse.Namespace(device="cpu", threads=None, impl="auto")
    with running(args):
        assert not torch.is_grad_enabled()


def test_closed_pipe_is_quiet() -> None:
    """`magvit-fast info | head -c 0`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "magvit_fast.cli.main", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("still", [False, True])
def test_progress_on_a_terminal_only(
    still: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import pty

    pytest.importorskip("rich")

    def work() -> None:
        with progress("work", 40, "frames", still=still) as advance:
            for _ in range(4):
                advance(10)

    work()
    assert capfd.readouterr() == ("", "")
    parent, child = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(child, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        work()
    shown = ""
    with os.fdopen(parent, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        while part := screen.read(1 << 16):  # the system hands it on in parts; an error ends it
            shown += part.decode()
    assert "work" in shown
    assert "40/40" in shown
    assert "frames/s" in shown
    assert capfd.readouterr() == ("", "")


def test_the_entry_point_of_the_package() -> None:
    assert main_module.main is main
