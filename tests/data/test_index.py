"""The remembered index: cold and warm give the same, changes are noticed, trouble does no harm."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch

from magvit_fast.data import index as index_module
from magvit_fast.data.clips import Augmentation, VideoClips
from magvit_fast.data.index import FileFacts, cache_file, index_files
from magvit_fast.data.order import Draw
from magvit_fast.data.synthetic import render_clip
from magvit_fast.data.video import probe, read_video, write_video
from magvit_fast.errors import FileFormatError

pytest.importorskip("av")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three videos and one that is none."""
    root = tmp_path / "videos"
    for seed, frames in enumerate((9, 12, 40)):
        pixels = torch.from_numpy(render_clip(seed, frames, 16)).permute(3, 0, 1, 2)
        write_video(root / f"{seed}.mp4", pixels)
    (root / "text.mp4").write_text("not a video")
    return sorted(root.iterdir())


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []

    def counting(path: Path) -> object:
        names.append(path.name)
        return probe(path)

    monkeypatch.setattr(index_module, "probe", counting)
    return names


def test_facts_are_those_of_the_files(files: list[Path]) -> None:
    for _ in range(2):  # cold, warm
        *good, bad = index_files(files)
        for file, facts in zip(files, good, strict=False):
            info = probe(file)
            assert facts == FileFacts(info.frames, info.keyframes)
        assert isinstance(bad, FileFormatError)
        assert "text.mp4" in str(bad)


def test_only_new_and_changed_files_are_read_again(files: list[Path], probed: list[str]) -> None:
    index_files(files)
    assert sorted(probed) == ["0.mp4", "1.mp4", "2.mp4", "text.mp4"]
    probed.clear()
    index_files(files)
    assert probed == ["text.mp4"]  # damaged files are looked at every time
    probed.clear()
    shutil.copy(files[2], files[0])
    os.utime(files[1], ns=(1, 1))
    shutil.copy(files[1], files[3])  # somebody has replaced the bad one
    found = index_files(files)
    assert sorted(probed) == ["0.mp4", "1.mp4", "text.mp4"]
    assert [facts.frames for facts in found if isinstance(facts, FileFacts)] == [40, 12, 40, 12]
    probed.clear()
    index_files(list(reversed(files)))
    assert probed == []


def test_many_files_in_several_parts(
    files: list[Path], probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_AT_ONCE", 2)
    many = [*files[:3], files[1], files[0]]
    frames = [facts.frames for facts in index_files(many) if isinstance(facts, FileFacts)]
    assert frames == [9, 12, 40, 12, 9]
    assert len(probed) == 3  # a later part finds what an earlier one has read


def test_a_data_set_is_the_same_cold_and_warm(files: list[Path], probed: list[str]) -> None:
    cold = VideoClips(files[0].parent, frames=5, size=16)
    assert len(probed) == 4
    probed.clear()
    warm = VideoClips(files[0].parent, frames=5, size=16)
    assert probed == ["text.mp4"]
    assert cold.identity == warm.identity
    assert cold.files == warm.files == files[:3]
    for draw in (Draw(0, 0), Draw(3, 2), Draw(1, 1, still=True)):
        assert torch.equal(cold[draw]["video"], warm[draw]["video"])


def test_clips_begin_at_the_right_frame(files: list[Path]) -> None:
    """The keyframes of each file are its own."""
    clips = VideoClips(files[0].parent, frames=5, size=16)
    for number, file in enumerate(clips.files):
        assert clips._keyframes_of(number) == probe(file).keyframes
    whole = read_video(files[2])
    starts = set()
    plain = Augmentation(crop_scale=(1.0, 1.0), flip=False)
    clips = VideoClips(files[0].parent, frames=5, size=16, augmentation=plain)
    for epoch in range(12):
        video = clips[Draw(epoch, 2)]["video"]
        start = [s for s in range(36) if torch.equal(video, whole[:, s : s + 5])]
        assert len(start) == 1
        starts.add(start[0])
    assert max(starts) > 15


@pytest.mark.parametrize("trouble", ["damaged", "other version", "no place", "full disk"])
def test_trouble_with_the_cache_does_no_harm(files: list[Path], trouble: str) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True)
    if trouble == "damaged":
        path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    elif trouble == "other version":
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("CREATE TABLE videos (path TEXT)")
            database.execute("PRAGMA user_version = 99")
    elif trouble == "no place":
        path.parent.rmdir()
        path.parent.write_text("a file is in the way")
    else:
        index_files([])  # makes the table
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute(
                "CREATE TRIGGER full BEFORE INSERT ON videos "
                "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
            )
    frames = [facts.frames for facts in index_files(files) if isinstance(facts, FileFacts)]
    assert frames == [9, 12, 40]


def test_an_interrupt_leaves_the_database_whole(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "probe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index_files(files)
    assert isinstance(index_files(files)[0], FileFacts)


def test_of_two_that_start_together_one_reads(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def slow(path: Path) -> object:
        names.append(path.name)
        time.sleep(0.2)
        return probe(path)

    monkeypatch.setattr(index_module, "probe", slow)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(index_files(files[:3]))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(names) == 3
