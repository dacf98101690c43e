"""Files and directories appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from magvit_fast.data import atomic
from magvit_fast.data.atomic import (
    atomic_directory,
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
)
from magvit_fast.errors import FileWriteError


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


def _fill_half(path: Path, error: BaseException) -> None:
    with atomic_directory(path) as temporary:
        (temporary / "weights").write_text("half")
        raise error


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.txt"
    atomic_write_text(target, "one")
    atomic_write_text(target, "two é")
    assert target.read_text(encoding="utf-8") == "two é"
    assert _names(target.parent) == ["file.txt"]


def test_temporary_is_beside_and_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "clip.mp4") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".mp4"
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"x")


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    atomic_write_bytes(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("old", [None, b"old"])
def test_exception_keeps_the_old_content(tmp_path: Path, old: bytes | None) -> None:
    target = tmp_path / "file"
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(KeyError, match="mine"):
        _write_half(target, KeyError("mine"))
    assert (target.read_bytes() if target.exists() else None) == old
    assert _names(tmp_path) == (["file"] if old else [])


def test_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    message = f"cannot write {target}: No space left on device"
    with pytest.raises(FileWriteError, match=message):
        _write_half(target, OSError(errno.ENOSPC, "No space left on device", "temporary"))
    assert target.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_full_disk_reported_in_words(tmp_path: Path, message: str) -> None:
    with pytest.raises(FileWriteError, match="No space left"):
        _write_half(tmp_path / "file", RuntimeError(message))


def test_safetensors_on_a_limited_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(FileWriteError, match="File too large"),
            atomic_path(tmp_path / "f") as t,
        ):
            save_file({"x": torch.zeros(10_000)}, t)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _names(tmp_path) == []


def test_an_unrelated_oserror_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        (tmp_path / "missing-input").read_bytes()
    assert _names(tmp_path) == []


def test_a_real_limit_on_the_file_size(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FileWriteError, match="File too large"):
            atomic_write_bytes(target, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    script = (
        "import sys, time\n"
        "from magvit_fast.data.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    assert target.read_bytes() == b"old"


def test_directory_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError, match="it is a directory"), atomic_path(tmp_path):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("kind", [atomic_path, atomic_directory])
def test_an_interrupt_at_any_line_leaves_nothing(kind: Any, tmp_path: Path) -> None:
    """KeyboardInterrupt is raised before each line of atomic.py in turn."""
    code = atomic.__file__

    def run(at: int) -> bool:
        """Whether line number `at` of those run was reached, and interrupted."""
        count = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != code:
                return None
            if event == "line":
                count += 1
                if count == at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with contextlib.suppress(ZeroDivisionError), kind(tmp_path / "out"):
                raise ZeroDivisionError  # the way out that has something to remove
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    at = 1
    while run(at):
        assert _names(tmp_path) == [], f"interrupted at line {at} of those run"
        at += 1
    assert at > 10


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(FileWriteError, match=f"cannot write {path}: it is a device or a pipe"):
            atomic_write_text(path, "x")
    assert pipe.is_fifo()
    assert _names(tmp_path) == ["link", "pipe"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.txt", tmp_path / "there" / "target.txt"
    link.symlink_to(target)
    for text in ("first", "second"):  # the target does not exist, then it does
        atomic_write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert _names(tmp_path) == ["link.txt", "there"]


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileWriteError, match="cannot write"):
        atomic_write_bytes(tmp_path / "file" / "inside", b"")


def test_directory_is_made_and_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_directory(tmp_path / "model") as temporary:
            (temporary / content).write_text(content)
            (temporary / "sub").mkdir()
            (temporary / "sub" / "deep").write_text(content)
        assert _names(tmp_path) == ["model"]
        assert _names(tmp_path / "model") == sorted([content, "sub"])
        assert (tmp_path / "model" / "sub" / "deep").read_text() == content


def test_directory_exception_keeps_the_old(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("old")
    with pytest.raises(FileWriteError, match="No space"):
        _fill_half(tmp_path / "model", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert _names(tmp_path) == ["model"]


def test_directory_swap_that_fails_brings_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    rename, calls = os.rename, []

    def flaky(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:  # the old one is aside, the new one is about to take its name
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", flaky)
    with pytest.raises(FileWriteError, match="Input/output"), atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert _names(tmp_path) == ["model"]


def test_file_in_the_way_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(FileWriteError, match="in the way"), atomic_directory(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert (tmp_path / "model").read_text() == "a file"
