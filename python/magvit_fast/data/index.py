"""Frame counts and keyframes of many video files, remembered between runs.

Counting the frames of a file means reading all of it. What was found is kept in a small database
under the user's cache directory ($XDG_CACHE_HOME or ~/.cache, magvit_fast/videos.sqlite) and holds
as long as a file's size and time of change stay the same; only new and changed files are read again,
and of several processes that start together one reads while the others wait for it. Where no cache
can be kept everything works as well, only slower. Damaged files are not remembered: they are looked
at again, for somebody may have replaced them or changed their permissions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from magvit_fast.data.seeking import Keyframes
from magvit_fast.data.video import probe
from magvit_fast.errors import FileFormatError

log = logging.getLogger("magvit_fast")

_VERSION = 1  # of the table and of what its numbers mean
_PATIENCE = 3600.0  # seconds to wait for another process that reads the same files
_AT_ONCE = 500  # files between two commits: what an interrupt loses


@dataclass(frozen=True)
class FileFacts:
    """Shown frames of a file, and where decoding can begin (see seeking.py)."""

    frames: int
    keyframes: Keyframes


def index_files(files: Sequence[Path]) -> list[FileFacts | FileFormatError]:
    """The facts of each file, in order; for a file that cannot be read the error that says why."""
    database = _open()
    if database is None:
        return _read(files)
    with contextlib.closing(database):
        found: list[FileFacts | FileFormatError] = []
        for first in range(0, len(files), _AT_ONCE):
            found += _looked_up_or_read(database, files[first : first + _AT_ONCE])
        return found


def cache_file() -> Path:
    """Where the facts are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "magvit_fast" / "videos.sqlite"


def _open() -> sqlite3.Connection | None:
    """The database, ready for use; None where there can be none."""
    path, database = cache_file(), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
        _make_table(database)
    except (sqlite3.Error, OSError, RuntimeError) as error:  # RuntimeError: there is no home
        damaged = type(error) is sqlite3.DatabaseError
        log.log(
            logging.WARNING if damaged else logging.DEBUG,
            "%s: no index of video files is kept (%s)%s",
            path, error, "; delete the file to have it made again" if damaged else "",
        )  # fmt: skip
        if database is not None:
            database.close()
        return None
    return database


def _make_table(database: sqlite3.Connection) -> None:
    """An empty table, unless there is one of this version."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == _VERSION:
        return
    database.execute("BEGIN IMMEDIATE")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:  # no other process was faster
        database.execute("DROP TABLE IF EXISTS videos")
        database.execute(
            "CREATE TABLE videos (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, "
            "frames INTEGER, keyframes TEXT)"
        )
        database.execute(f"PRAGMA user_version = {_VERSION}")
    database.execute("COMMIT")


def _looked_up_or_read(
    database: sqlite3.Connection, files: Sequence[Path]
) -> list[FileFacts | FileFormatError]:
    try:
        known = _known(database, files)
        if None not in known:
            return [facts for facts in known if facts is not None]
        database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:  # damaged, read-only, held for too long
        log.debug("%s: the index of video files is of no use (%s)", cache_file(), error)
        return _read(files)
    try:
        known = _known(database, files)  # another process may have been here
        missing = [file for file, facts in zip(files, known, strict=True) if facts is None]
        stamps = {file: _stamp(file) for file in missing}  # before reading: a change shows later
        fresh = dict(zip(missing, _read(missing), strict=True))
        _remember(database, fresh, stamps)
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")
    return [
        fresh[file] if facts is None else facts for file, facts in zip(files, known, strict=True)
    ]


def _remember(
    database: sqlite3.Connection,
    fresh: Mapping[Path, FileFacts | FileFormatError],
    stamps: Mapping[Path, tuple[int, int]],
) -> None:
    rows = [
        (_key(file), *stamps[file], facts.frames, json.dumps(facts.keyframes))
        for file, facts in fresh.items()
        if isinstance(facts, FileFacts)
    ]
    try:
        database.executemany("INSERT OR REPLACE INTO videos VALUES (?, ?, ?, ?, ?)", rows)
        database.execute("COMMIT")
    except sqlite3.Error as error:  # the disk is full
        log.debug("%s: nothing is added to the index of video files (%s)", cache_file(), error)


def _known(database: sqlite3.Connection, files: Sequence[Path]) -> list[FileFacts | None]:
    keys = [_key(file) for file in files]
    marks = ", ".join("?" * len(keys))
    rows = {
        path: (size, changed, frames, keyframes)
        for path, size, changed, frames, keyframes in database.execute(
            f"SELECT * FROM videos WHERE path IN ({marks})", keys
        )
    }
    found: list[FileFacts | None] = []
    for file, key in zip(files, keys, strict=True):
        row = rows.get(key)
        if row is None or row[:2] != _stamp(file):
            found.append(None)
        else:
            found.append(FileFacts(row[2], tuple((n, t) for n, t in json.loads(row[3]))))
    return found


def _key(file: Path) -> str:
    return os.path.abspath(file)


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of change; of a file that is not there numbers that no file has."""
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _read(files: Sequence[Path]) -> list[FileFacts | FileFormatError]:
    def facts(file: Path) -> FileFacts | FileFormatError:
        try:
            info = probe(file)
        except FileFormatError as error:
            return error
        return FileFacts(info.frames, info.keyframes)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(facts, files))
