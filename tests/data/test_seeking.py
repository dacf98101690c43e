"""Frames read from the middle are those of a whole decoding, in every kind of file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from magvit_fast.data import video as video_module
from magvit_fast.data.seeking import KeyframeScan, candidates, keyframes_before, times_are_stored
from magvit_fast.data.video import iter_frames, probe, read_video
from magvit_fast.errors import FileFormatError

av = pytest.importorskip("av")

FRAMES = 75


def _x264(parameters: str) -> dict[str, Any]:
    return {"codec": "libx264", "options": {"x264-params": parameters}}


FILES: dict[str, dict[str, Any]] = {
    "closed_bframes.mp4": _x264("keyint=12:bframes=3:open-gop=0"),
    "odd_scenecut.mp4": _x264("keyint=17:min-keyint=3:bframes=2:scenecut=80"),
    "pyramid.mkv": _x264("keyint=13:bframes=4:b-pyramid=normal:open-gop=1"),
    "open.ts": _x264("keyint=7:min-keyint=7:bframes=3:open-gop=1:scenecut=0"),
    "short_groups.mp4": _x264("keyint=2:min-keyint=1:bframes=1:scenecut=0"),
    "all_intra.mov": _x264("keyint=1"),
    "refresh.ts": _x264("keyint=20:intra-refresh=1:bframes=0"),
    "one_group.mp4": _x264("keyint=500:bframes=3:scenecut=0"),
    "fragmented.mp4": {
        **_x264("keyint=10:bframes=2"),
        "container": {"movflags": "frag_keyframe+empty_moov"},
    },
    "faststart.mp4": {**_x264("keyint=10:bframes=2"), "container": {"movflags": "faststart"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "bframes": 2, "gop": 9},
    "mpeg2.ts": {"codec": "mpeg2video", "bframes": 2, "gop": 9},
    "mpeg2.mkv": {"codec": "mpeg2video", "bframes": 2, "gop": 9},
    "mpeg4.mp4": {"codec": "mpeg4", "bframes": 2, "gop": 9},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 9, "options": {"cpu-used": "8"}},
    "order_only.avi": _x264("keyint=7:bframes=3"),
    "packed.avi": {"codec": "mpeg4", "bframes": 2, "gop": 9},
    "raw.h264": _x264("keyint=7:bframes=3"),
    "picture.gif": {"codec": "gif", "pixels": "rgb8"},
}
# Groups of 11 frames, open, with B-frames; stored, for the x265 in some FFmpeg builds is not to be
# trusted with frames this small.
STORED = Path(__file__).parent / "clips" / "hevc_open_groups.mp4"
NAMES = (*FILES, STORED.name)
SEEKABLE = {name for name in NAMES if name.rsplit(".", 1)[1] in ("mp4", "mov", "mkv", "webm")}
ONE_KEYFRAME = {"one_group.mp4"}


def _picture(index: int) -> np.ndarray:
    """Moving waves with a cut in the middle, so that scene detection has something to find."""
    y, x = np.mgrid[:32, :48]
    phase = 3.0 * index + (40 if index > 31 else 0)
    planes = [
        128 + 100 * np.sin((x + phase) / 6),
        128 + 100 * np.cos((y - phase) / 5),
        x * 4 + phase,
    ]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def _write(path: Path, settings: dict[str, Any], frames: int = FRAMES) -> None:
    with av.open(str(path), "w", options=settings.get("container", {})) as container:
        stream = container.add_stream(settings["codec"], 25, options=settings.get("options", {}))
        stream.width, stream.height = 48, 32
        stream.pix_fmt = settings.get("pixels", "yuv420p")
        stream.thread_count = 1
        if "bframes" in settings:
            stream.codec_context.max_b_frames = settings["bframes"]
        if "gop" in settings:
            stream.codec_context.gop_size = settings["gop"]
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(_picture(index), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seek")
    for name, settings in FILES.items():
        if settings["codec"] in av.codecs_available:
            _write(root / name, settings)
    return root


def _file(folder: Path, name: str) -> Path:
    if name == STORED.name:
        return STORED
    if not (folder / name).exists():
        pytest.skip(f"this FFmpeg has no encoder {FILES[name]['codec']}")
    return folder / name


@pytest.mark.parametrize("name", NAMES)
def test_every_start_gives_the_frames_of_a_whole_decoding(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "_WORTH_SEEKING", 1)
    path = _file(folder, name)
    whole = torch.stack(list(iter_frames(path, keyframes=())), dim=1)
    info = probe(path)
    assert whole.shape[1] == info.frames == FRAMES
    for start in range(FRAMES):
        for keyframes in (info.keyframes, None):
            got = next(iter_frames(path, start=start, keyframes=keyframes))
            assert torch.equal(got, whole[:, start]), (start, keyframes)
    for start in (10, 40, 73):  # and what follows, to the end
        rest = torch.stack(list(iter_frames(path, start=start, keyframes=info.keyframes)), dim=1)
        assert torch.equal(rest, whole[:, start:]), start
    strided = read_video(path, start=23, stride=4, frames=10, keyframes=info.keyframes)
    assert torch.equal(strided, whole[:, 23:63:4])


@pytest.mark.parametrize("name", NAMES)
def test_keyframes_are_found_where_times_are_stored(folder: Path, name: str) -> None:
    info = probe(_file(folder, name))
    if name not in SEEKABLE:
        assert info.keyframes == ()
        return
    numbers = [number for number, _ in info.keyframes]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert (len(numbers) > 1) == (name not in ONE_KEYFRAME)


@pytest.mark.parametrize("name", sorted(SEEKABLE - ONE_KEYFRAME))
def test_few_frames_are_decoded(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of it all: a late frame costs a group of pictures and not the whole file."""
    path = _file(folder, name)
    info = probe(path)
    seen = []
    convert = video_module._frames_from
    decode_at = video_module._decode_at

    def counting(*arguments: Any) -> Any:
        for frame in decode_at(*arguments):
            seen.append(frame)
            yield frame

    monkeypatch.setattr(video_module, "_decode_at", counting)
    monkeypatch.setattr(video_module, "_decode", lambda *_: pytest.fail("decoding from the front"))
    frame = next(iter(convert(path, 70, info.keyframes)))
    assert frame is not None
    assert len(seen) <= 2 + 13  # the landing, and at most a group


def test_a_wrong_index_falls_back_to_the_front(folder: Path) -> None:
    """Keyframes of another file: the time stamps are not there, or no keyframe is."""
    path = _file(folder, "closed_bframes.mp4")
    whole = read_video(path, keyframes=())
    for keyframes in (((5, 10**9),), ((5, -50),), ((5, 3),)):
        got = next(iter_frames(path, start=9, keyframes=keyframes))
        assert torch.equal(got, whole[:, 9])


def test_short_of_frames(folder: Path) -> None:
    path = _file(folder, "closed_bframes.mp4")
    with pytest.raises(FileFormatError, match=r"too short: 3 frames asked for .* found 2"):
        read_video(path, frames=3, start=73)
    with pytest.raises(FileFormatError, match="at least one frame"):
        read_video(path, start=75)


def test_truncation_shows_after_a_seek(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mkv"
    data = _file(folder, "pyramid.mkv").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    keyframes = probe(folder / "pyramid.mkv").keyframes
    with pytest.raises(FileFormatError, match=r"cut\.mkv: is truncated or damaged"):
        read_video(path, start=20, keyframes=keyframes)


class _Packet:
    """What a scan looks at."""

    def __init__(self, pts: int | None, dts: int, key: bool = False, discard: bool = False) -> None:
        self.pts, self.dts, self.is_keyframe, self.is_discard = pts, dts, key, discard
        self.size = 1


def test_numbers_by_hand() -> None:
    """Decoded I0 P3 B1 B2 | I6 B4 B5 (open group) P8 B7."""
    scan = KeyframeScan()
    for dts, (pts, key) in enumerate(
        [(0, True), (3, False), (1, False), (2, False), (6, True), (4, False), (5, False), (8, False),
         (7, False)]
    ):  # fmt: skip
        scan.add(_Packet(pts * 100, dts * 100 - 100, key))
    assert scan.frames == 9
    assert scan.keyframes() == ((0, 0), (6, 600))
    assert candidates(scan.keyframes(), 5) == []
    assert candidates(scan.keyframes(), 6) == [(6, 600)]
    assert candidates(((0, 0), (4, 9), (8, 17), (12, 25)), 11) == [(8, 17), (4, 9)]


def test_frames_that_are_never_shown_do_not_count() -> None:
    scan = KeyframeScan()
    for packet in (_Packet(-200, 0, True, discard=True), _Packet(0, 1), _Packet(100, 2, True)):
        scan.add(packet)
    assert (scan.frames, scan.keyframes()) == (2, ((1, 100),))


def test_times_that_cannot_be_relied_on() -> None:
    missing, double = KeyframeScan(), KeyframeScan()
    for pts in (0, None, 200):
        missing.add(_Packet(pts, 0, True))
    for pts in (0, 100, 100):
        double.add(_Packet(pts, 0, True))
    assert missing.keyframes() == double.keyframes() == ()
    assert (missing.frames, double.frames) == (3, 3)
    assert times_are_stored("mov,mp4,m4a,3gp,3g2,mj2")
    assert times_are_stored("matroska,webm")
    assert not times_are_stored("avi")
    assert not times_are_stored("h264")


def test_only_packets_before_the_wanted_frame_are_read() -> None:
    read = 0

    def packets() -> Any:
        nonlocal read
        for number in range(100_000):
            read += 1
            yield _Packet(number * 10, number * 10 - 20, number % 50 == 0)

    found = keyframes_before(packets(), 1000)
    assert read < 2000
    assert found[-1] == (1000, 10_000)
    many = KeyframeScan()
    for number in range(5000):
        many.add(_Packet(number, number, True))
    assert len(many.keyframes()) <= 1024
    assert all(number == time for number, time in many.keyframes())
