"""Clips from real files: what comes out, what is passed over, who asks does not matter."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from magvit_fast.data.clips import Augmentation, SceneClips, VideoClips, list_files
from magvit_fast.data.order import BatchOrder, Draw
from magvit_fast.data.synthetic import SCENE_CLASSES, render_clip
from magvit_fast.data.video import read_video, write_video
from magvit_fast.errors import FileFormatError

PLAIN = Augmentation(crop_scale=(1.0, 1.0), flip=False)


def scene(seed: int, frames: int, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(render_clip(seed, frames, size)).permute(3, 0, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of H.264 files, one of them short, and three bad ones."""
    root = tmp_path_factory.mktemp("videos")
    for seed, (name, frames) in enumerate(
        [("left/a.mp4", 12), ("left/b.mp4", 9), ("right/c.mp4", 17), ("right/short.mp4", 3)]
    ):
        write_video(root / name, scene(seed, frames))
    data = (root / "left/a.mp4").read_bytes()
    (root / "left/truncated.mp4").write_bytes(data[: len(data) // 2])
    (root / "right/empty.mp4").write_bytes(b"")
    (root / "right/text.mp4").write_text("not a video")
    (root / "notes.txt").write_text("ignored: no video by its name")
    return root


def test_bad_files_are_named_in_one_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        clips = VideoClips(folder, frames=9, size=16)
    assert [f.name for f in clips.files] == ["a.mp4", "b.mp4", "c.mp4", "short.mp4"]
    assert (clips.num_clips, clips.num_stills) == (3, 4)
    skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(skipped) == 1
    assert "3 of 7" in skipped[0]
    assert all(name in skipped[0] for name in ("truncated.mp4", "empty.mp4", "text.mp4"))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        VideoClips(folder, frames=9, size=16, quiet=True)
    assert not caplog.records


def test_a_full_window_without_augmentation_is_the_file(folder):
    clips = VideoClips(folder / "right/c.mp4", frames=17, size=32, augmentation=PLAIN)
    torch.testing.assert_close(
        clips[Draw(0, 0)]["video"], read_video(folder / "right/c.mp4"), rtol=0, atol=0
    )


def test_items_have_the_shape_asked_for_and_vary_by_epoch(folder):
    options = Augmentation(crop_scale=(0.5, 1.0), strides=(1, 2))
    clips = VideoClips(folder, frames=5, size=(16, 24), augmentation=options, labels=True)
    a, again, other = clips[Draw(0, 1)], clips[Draw(0, 1)], clips[Draw(1, 1)]
    assert a["video"].shape == (3, 5, 16, 24)
    assert a["video"].dtype == torch.float32
    assert a["video"].min() >= 0
    assert a["video"].max() <= 1
    assert torch.equal(a["video"], again["video"])
    assert not torch.equal(a["video"], other["video"])
    assert clips[Draw(0, 3, still=True)]["video"].shape == (3, 1, 16, 24)
    assert clips.class_names == ("left", "right")
    assert [clips[Draw(0, i)]["class_id"] for i in range(3)] == [0, 0, 1]
    unlabeled = VideoClips(folder, frames=5, size=(16, 24), augmentation=options)
    assert clips.identity != unlabeled.identity  # half a token set of each would have no classes


def test_stride_takes_every_other_frame(folder):
    options = Augmentation(crop_scale=(1.0, 1.0), flip=False, strides=(2,))
    clips = VideoClips(folder / "right/c.mp4", frames=9, size=32, augmentation=options)
    assert torch.equal(clips[Draw(0, 0)]["video"], read_video(folder / "right/c.mp4")[:, ::2])


def test_flip_and_crop_happen(folder):
    whole = read_video(folder / "right/c.mp4")
    flips = VideoClips(
        folder / "right/c.mp4", frames=17, size=32, augmentation=Augmentation((1.0, 1.0), flip=True)
    )
    seen = [bool(torch.equal(flips[Draw(e, 0)]["video"], whole)) for e in range(12)]
    mirrored = [bool(torch.equal(flips[Draw(e, 0)]["video"], whole.flip(-1))) for e in range(12)]
    assert any(seen)
    assert any(mirrored)
    assert all(s != m for s, m in zip(seen, mirrored, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_batches(folder, workers):
    clips = VideoClips(folder, frames=5, size=16)
    order = BatchOrder(num_clips=clips.num_clips, batch_size=2, seed=5)
    loader = DataLoader(clips, batch_sampler=list(order.batches(1, 4)), num_workers=workers)
    for batch, draws in zip(loader, order.batches(1, 4), strict=True):
        assert torch.equal(batch["video"], torch.stack([clips[d]["video"] for d in draws]))


def test_a_file_that_breaks_later_gives_way_to_the_next(folder, tmp_path, caplog):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(folder / "left" / name, tmp_path / name)
    clips = VideoClips(tmp_path, frames=5, size=16)
    (tmp_path / "a.mp4").write_bytes(b"gone")
    with caplog.at_level(logging.WARNING, "magvit_fast"):
        samples = [clips[Draw(epoch, 0)] for epoch in range(3)]
    assert [s["replaced"] for s in samples] == [1, 1, 1]
    assert sum("a.mp4" in r.getMessage() for r in caplog.records) == 1
    (tmp_path / "b.mp4").write_bytes(b"gone")
    with pytest.raises(FileFormatError, match="none of 2 files"):
        clips[Draw(0, 0)]


def test_nothing_usable_is_an_error(folder, tmp_path):
    with pytest.raises(FileFormatError, match="no usable video"):
        VideoClips(folder, frames=33, size=16)
    with pytest.raises(FileFormatError, match="no usable video: it names no video or image file"):
        VideoClips(tmp_path, frames=5, size=16)
    with pytest.raises(FileFormatError, match=r"absent\.txt"):
        VideoClips(tmp_path / "absent.txt")


def test_list_file_names_paths_relative_to_itself(folder):
    listed = folder / "list.txt"
    listed.write_text("right/c.mp4\n\nleft/a.mp4\n")
    try:
        assert [f.name for f in list_files(listed)] == ["c.mp4", "a.mp4"]
    finally:
        listed.unlink()


def test_scenes_are_a_source_like_any_other():
    scenes = SceneClips(4, frames=5, size=16)
    clip = scenes[Draw(3, 2)]["video"]
    assert torch.equal(clip, scene(2, 5, 16).float() / 255)
    still = scenes[Draw(0, 2, still=True)]["video"]
    assert any(torch.equal(still[:, 0], clip[:, t]) for t in range(5))


def test_scenes_have_the_color_of_their_floor_for_a_class():
    scenes = SceneClips(30, frames=2, size=16, labels=True)
    assert scenes.class_names == SCENE_CLASSES
    assert scenes.identity != SceneClips(30, frames=2, size=16).identity
    items = [scenes[Draw(0, i)] for i in range(30)]
    assert {item["class_id"] for item in items} == set(range(len(SCENE_CLASSES)))
    means = torch.stack([item["video"].flatten(1).median(1).values for item in items])
    classes = torch.tensor([item["class_id"] for item in items])
    blue, brown = means[classes == 0].mean(0), means[classes == 3].mean(0)
    assert blue[2] > blue[0]
    assert brown[0] > brown[2]
    assert SceneClips(3, frames=2, size=16)[Draw(0, 0)]["class_id"] == -1
