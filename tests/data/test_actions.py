"""Actions beside videos: cut like the frames, stored with the tokens, bad files named."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.tiny import write_scene

from magvit_fast.data.actions import action_file, read_actions
from magvit_fast.data.clips import Augmentation, VideoClips
from magvit_fast.data.order import Draw
from magvit_fast.data.tokens import TokenClips, TokenHeader, load_tokens, write_index, write_shard
from magvit_fast.errors import FileFormatError

PLAIN = Augmentation(crop_scale=(1.0, 1.0), flip=False)


def counted(frames: int, width: int = 2) -> np.ndarray:
    """Row t is (t, t + 0.5, ...): it tells the frame it belongs to."""
    return np.arange(frames, dtype=np.float64)[:, None] + 0.5 * np.arange(width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("robot")
    for seed, (name, frames) in enumerate((("a", 6), ("b", 7), ("c", 5))):
        write_scene(root / f"{name}.mp4", seed, frames, 16)
    np.save(root / "a.npy", counted(6))
    np.savez(root / "b.npz", actions=counted(6))  # one row less than frames
    np.save(root / "c.npy", counted(5).astype(np.int32))
    return root


def test_rows_are_those_of_the_frames_taken(folder: Path) -> None:
    clips = VideoClips(folder, frames=4, size=16, augmentation=PLAIN, actions=True)
    starts = set()
    for epoch in range(20):
        sample = clips[Draw(epoch, 0)]
        rows = sample["actions"]
        assert (rows.dtype, tuple(rows.shape)) == (torch.float32, (4, 2))
        start = int(rows[0, 0])
        starts.add(start)
        assert torch.equal(rows, torch.from_numpy(counted(6)).float()[start : start + 4])
        torch.testing.assert_close(
            sample["video"], VideoClips(folder, frames=6, size=16, augmentation=PLAIN)[
                Draw(0, 0)]["video"][:, start : start + 4], rtol=0, atol=0,
        )  # fmt: skip
    assert starts == {0, 1, 2}
    assert "actions" not in VideoClips(folder, frames=4, size=16)[Draw(0, 0)]
    with_actions = VideoClips(folder, frames=4, size=16, augmentation=PLAIN, actions=True)
    without = VideoClips(folder, frames=4, size=16, augmentation=PLAIN)
    assert with_actions.identity != without.identity


def test_a_missing_last_row_is_zeros(folder: Path) -> None:
    rows = read_actions(folder / "b.mp4", 7)
    assert torch.equal(rows[:6], torch.from_numpy(counted(6)).float())
    assert not rows[6].any()
    assert read_actions(folder / "c.mp4", 5)[2].tolist() == [2.0, 2.0]  # int32 truncated 2.5


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, r"x\.mp4: has no actions beside it; expected x\.npy or x\.npz"),
        (lambda p: np.save(p / "x.npy", counted(9)), r"x\.npy: expected \[6, A\] or \[5, A\]"),
        (lambda p: np.save(p / "x.npy", np.zeros(6)), r"x\.npy: expected .*got \(6,\)"),
        (lambda p: np.save(p / "x.npy", np.zeros((6, 0))), r"x\.npy: expected .*got \(6, 0\)"),
        (lambda p: np.save(p / "x.npy", np.array([["a"]] * 6)), r"x\.npy: expected numbers"),
        (lambda p: np.save(p / "x.npy", np.full((6, 1), np.inf)), r"x\.npy: holds NaN or inf"),
        (
            lambda p: np.save(p / "x.npy", np.array([[None]] * 6), allow_pickle=True),
            r"x\.npy: cannot be read as a NumPy array",
        ),
        (lambda p: (p / "x.npy").write_bytes(b"not numbers"), r"x\.npy: cannot be read"),
        (lambda p: (p / "x.npy").write_bytes(b""), r"x\.npy: cannot be read"),
        (lambda p: (p / "x.npz").write_bytes(b"PK\x03\x04cut"), r"x\.npz: cannot be read"),
        (
            lambda p: np.savez(p / "x.npz", moves=counted(6)),
            r"x\.npz: expected an array named 'actions', found moves",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, write, message: str) -> None:
    write(tmp_path)
    with pytest.raises(FileFormatError, match=message):
        read_actions(tmp_path / "x.mp4", 6)


def test_videos_without_good_actions_are_passed_over(tmp_path: Path, caplog) -> None:
    for seed, name in enumerate(("a", "b", "c", "d")):
        write_scene(tmp_path / f"{name}.mp4", seed, 5, 16)
    np.save(tmp_path / "a.npy", counted(5))
    np.save(tmp_path / "c.npy", counted(5, width=3))
    np.save(tmp_path / "d.npy", counted(5))
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        clips = VideoClips(tmp_path, frames=4, size=16, augmentation=PLAIN, actions=True)
    assert [f.name for f in clips.files] == ["a.mp4", "d.mp4"]
    (line,) = (r.getMessage() for r in caplog.records)
    assert "skipped 2 of 4 files" in line
    assert "b.mp4: has no actions beside it" in line
    assert "c.npy: its actions have 3 numbers, those of the first video 2" in line
    for name in "ad":
        (tmp_path / f"{name}.npy").unlink()
    (tmp_path / "c.npy").unlink()
    with pytest.raises(FileFormatError, match="no usable video among 4 files"):
        VideoClips(tmp_path, frames=4, size=16, augmentation=PLAIN, actions=True)


def test_augmentations_that_actions_do_not_survive_are_refused(folder: Path) -> None:
    for augmentation in (Augmentation(flip=True), Augmentation(flip=False, strides=(1, 2))):
        with pytest.raises(ValueError, match="augmentation: expected flip False and strides"):
            VideoClips(folder, frames=4, augmentation=augmentation, actions=True)


def test_both_kinds_of_file_are_found(folder: Path) -> None:
    assert action_file(folder / "a.mp4").name == "a.npy"
    assert action_file(folder / "b.mp4").name == "b.npz"


def test_shards_keep_actions_as_they_are(tmp_path: Path) -> None:
    header = TokenHeader("f", 4, (3, 2, 2), (3, 8, 8))
    ids, actions = torch.zeros(5, 3, 2, 2, dtype=torch.int64), torch.randn(5, 3, 2)
    entry = write_shard(tmp_path / "t.safetensors", header, "job", ids=ids, actions=actions)
    write_index(tmp_path, header, [entry])
    _, tensors = load_tokens(tmp_path / "t.safetensors")
    assert torch.equal(tensors["actions"], actions)
    item = TokenClips(tmp_path)[Draw(0, 3)]
    assert torch.equal(item["actions"], actions[3])
    assert item["ids"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"actions: expected \[N, 3, A\], got \(5, 2, 2\)"):
        write_shard(tmp_path / "u.safetensors", header, "job", ids=ids, actions=actions[:, :2])
