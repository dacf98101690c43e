"""Files and directories that appear whole or not at all.

Everything is written beside its destination under a hidden temporary name, flushed to the disk,
then renamed: a full disk, an exception or a kill leaves the old content (or none), never half of
the new.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from magvit_fast.errors import FileWriteError

# What a destination can do wrong while it is written, as opposed to mistakes of the writer.
_DESTINATION_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
    }
)
# The same number inside a message: safetensors raises its own exception type, in Rust's words.
_RUST_ERRNO = re.compile(r"(?:os error |Os \{ code: )(\d+)")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _as_write_error(path: Path, error: BaseException) -> FileWriteError | None:
    """The one-line error for a destination that cannot take the data; None for other trouble."""
    if isinstance(error, FileWriteError):
        return None
    number = getattr(error, "errno", None)
    if number is None and (found := _RUST_ERRNO.search(str(error))):
        number = int(found.group(1))
    return FileWriteError.of(path, os.strerror(number)) if number in _DESTINATION_ERRNOS else None


def _parent(path: Path) -> Path:
    """The existing directory that will hold `path`, made if needed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileWriteError.of(path, error.strerror or str(error)) from error
    return path.parent


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_directory(path: Path) -> None:
    """Make the renaming durable. Not every file system can; the content is safe without it."""
    with contextlib.suppress(OSError):
        _fsync(path)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write; move it to `path` when the block ends without an exception.

    The temporary file is in the same directory and has the same suffix (writers that pick a format
    by name keep working); missing parents are made. An existing file at `path` is replaced; a link
    stays and what it points to is replaced.

    Raises:
        FileWriteError: the destination cannot be written (disk full, no permission, a directory, a
            device or pipe, whose name a file must not take).
        Otherwise whatever the block raises. Always `path` is untouched and the temporary gone.
    """
    path = Path(path)
    if path.is_dir():
        raise FileWriteError.of(path, "it is a directory")
    if path.exists() and not path.is_file():
        raise FileWriteError.of(path, "it is a device or a pipe, no file")
    if path.is_symlink():
        path = path.resolve()
    parent = _parent(path)
    # The name is known before the file exists, and two blocks remove it: wherever an interrupt falls,
    # one of them is still to come.
    temporary = parent / f".{path.stem[:64]}.{secrets.token_hex(8)}.tmp{path.suffix}"
    try:
        try:
            _create(path, temporary)
            yield temporary
            _fsync(temporary)
            temporary.chmod(0o666 & ~_umask())  # made private; users expect ordinary files
            os.replace(temporary, path)
            _fsync_directory(parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            write_error = _as_write_error(path, error)
            if write_error is not None:
                raise write_error from error
            raise
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, temporary: Path) -> None:
    """An empty private file, which must not exist yet."""
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise FileWriteError.of(path, error.strerror or str(error)) from error


class _Rehearsed(Exception):
    """Ends a trial of writing before anything is replaced."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find trouble with a destination before the work and not after it; nothing is written.

    Raises:
        FileWriteError: as `atomic_path`.
    """
    with contextlib.suppress(_Rehearsed), atomic_path(path):
        raise _Rehearsed


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises FileWriteError."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all. Raises FileWriteError."""
    atomic_write_bytes(path, text.encode())


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory to fill; move it to `path` when the block ends well.

    An existing directory at `path` is replaced as a whole: it steps aside, the new one takes its
    name, then the old one is deleted. A kill between those two renames (microseconds) leaves both
    complete, the old one under the hidden name `.NAME.*.old`.

    Raises:
        FileWriteError: the destination cannot be written. Otherwise whatever the block raises.
        Always `path` is untouched and the temporary gone.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileWriteError.of(path, "a file of that name is in the way")
    parent = _parent(path)
    temporary = parent / f".{path.name[:64]}.{secrets.token_hex(8)}.tmp"
    try:  # two blocks, as in atomic_path
        try:
            _create_directory(path, temporary)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            temporary.chmod(0o777 & ~_umask())
            _replace_directory(temporary, path)
            _fsync_directory(parent)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            write_error = _as_write_error(path, error)
            if write_error is not None:
                raise write_error from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _create_directory(path: Path, temporary: Path) -> None:
    """An empty private directory, which must not exist yet."""
    try:
        temporary.mkdir(mode=0o700)
    except OSError as error:
        raise FileWriteError.of(path, error.strerror or str(error)) from error


def _replace_directory(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = new.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
