"""Video files: what is written comes back, and every kind of bad file is one clear error."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from magvit_fast.data import video as video_module
from magvit_fast.data.video import (
    center_crop_resize,
    iter_frames,
    probe,
    read_video,
    write_frames,
    write_image,
    write_video,
)
from magvit_fast.errors import FileFormatError, FileWriteError, MissingExtraError

av = pytest.importorskip("av")


def _moving_gradient(frames: int = 12, height: int = 48, width: int = 64) -> Tensor:
    """Smooth content that H.264 keeps well: [3, T, H, W]."""
    t = torch.arange(frames).view(-1, 1, 1) / max(frames, 2)
    y = torch.linspace(0, 1, height).view(1, -1, 1)
    x = torch.linspace(0, 1, width).view(1, 1, -1)
    red = (0.5 + 0.4 * torch.sin(3 * x + 4 * t) * torch.ones_like(y)).expand(frames, height, width)
    green = (0.2 + 0.6 * y).expand(frames, height, width)
    blue = (0.3 + 0.5 * t + 0.1 * x).expand(frames, height, width)
    return torch.stack([red, green, blue])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", _moving_gradient(), 24)
    return tmp_path / "clip.mp4"


def _write(
    path: Path, frames: int, *, codec: str = "libx264", options: dict[str, str] | None = None
) -> None:
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            noise = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))


def test_round_trip(clip: Path) -> None:
    source, back = _moving_gradient(), read_video(clip)
    assert back.shape == source.shape
    assert back.dtype == torch.float32
    assert (back - source).abs().mean() < 0.01  # limited-range 4:2:0 at crf 18
    assert (back - source).abs().max() < 0.06
    info = probe(clip)
    assert (info.frames, info.fps, info.width, info.height, info.codec) == (
        12,
        24.0,
        64,
        48,
        "h264",
    )
    assert info.seconds == 0.5


def test_pure_colors_survive(tmp_path: Path) -> None:
    """A wrong color matrix or range shows on saturated colors."""
    for color in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0), (1, 1, 0)):
        frame = torch.tensor(color, dtype=torch.float32).view(3, 1, 1, 1).expand(3, 2, 32, 32)
        write_video(tmp_path / "color.mp4", frame)
        assert (read_video(tmp_path / "color.mp4") - frame).abs().max() < 0.02


def test_the_files_own_color_matrix_is_honored(tmp_path: Path) -> None:
    green = np.zeros((32, 32, 3), dtype=np.uint8)
    green[..., 1] = 200
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709
        frame = av.VideoFrame.from_ndarray(green, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))
    got = read_video(tmp_path / "hd.mp4")[:, 0, 16, 16]
    assert (got - torch.tensor([0.0, 200 / 255, 0.0])).abs().max() < 0.03


def test_uint8_input_equals_float_input(tmp_path: Path) -> None:
    pixels = (_moving_gradient(3) * 255).round().to(torch.uint8)
    write_video(tmp_path / "a.mp4", pixels)
    write_video(tmp_path / "b.mp4", pixels.float() / 255)
    assert torch.equal(read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4"))


@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (34, 47), (33, 48)])
def test_odd_sizes_are_padded_to_even(tmp_path: Path, shape: tuple[int, int]) -> None:
    source = _moving_gradient(3, *shape)
    write_video(tmp_path / "odd.mp4", source)
    back = read_video(tmp_path / "odd.mp4")
    assert back.shape[2:] == tuple(extent + extent % 2 for extent in shape)
    assert (back[:, :, : shape[0], : shape[1]] - source).abs().mean() < 0.02


def test_odd_sized_files_are_read(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "odd.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 47, 33, "bgr0"
        image = (
            (_moving_gradient(1, 33, 47)[:, 0] * 255).byte().permute(1, 2, 0).contiguous().numpy()
        )
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    back = read_video(tmp_path / "odd.avi")
    assert back.shape == (3, 1, 33, 47)
    assert np.array_equal((back[:, 0] * 255).round().byte().permute(1, 2, 0).numpy(), image)


def test_start_stride_frames(clip: Path) -> None:
    whole = read_video(clip)
    assert torch.equal(read_video(clip, start=2, stride=3, frames=3), whole[:, [2, 5, 8]])
    assert torch.equal(read_video(clip, start=11), whole[:, 11:])
    assert torch.equal(torch.stack(list(iter_frames(clip, stride=5)), 1), whole[:, ::5])


def test_size_crops_the_center_and_resizes(clip: Path) -> None:
    assert read_video(clip, size=(17, 31)).shape == (3, 12, 17, 31)
    square = read_video(clip, size=24)
    assert torch.equal(
        square, center_crop_resize(read_video(clip).transpose(0, 1), 24).transpose(0, 1)
    )


@pytest.mark.parametrize(
    ("shape", "size", "window"),
    [
        ((40, 60), 40, (slice(0, 40), slice(10, 50))),
        ((61, 40), (30, 40), (slice(15, 45), slice(0, 40))),
    ],
)
def test_crop_without_resize_is_the_center_window(
    shape: tuple[int, int], size: int | tuple[int, int], window: tuple[slice, slice]
) -> None:
    frame = torch.rand(3, *shape)
    assert torch.equal(center_crop_resize(frame, size), frame[:, window[0], window[1]])


def test_resize_is_antialiased() -> None:
    """Period-2 stripes shrunk 4 times become flat gray; unfiltered sampling keeps stripes."""
    stripes = (torch.arange(64) % 2).float().expand(3, 64, 64)
    shrunk = center_crop_resize(stripes, 16)[:, 2:-2, 2:-2]
    assert (shrunk - 0.5).abs().max() < 0.02


def test_enlarging_a_tiny_frame() -> None:
    assert center_crop_resize(torch.rand(3, 1, 5), (8, 8)).shape == (3, 8, 8)


def test_rotation_metadata_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rotated:
        rotation = 90

        def to_ndarray(self, format: str) -> Any:
            return np.arange(6, dtype=np.uint8).reshape(1, 2, 3)

    upright = video_module._rgb(Rotated())
    assert upright.shape == (2, 1, 3)
    assert upright[:, 0].tolist() == [[3, 4, 5], [0, 1, 2]]  # counterclockwise


def test_streaming_write_reports_the_count(tmp_path: Path) -> None:
    frames = _moving_gradient(5)
    assert write_frames(tmp_path / "s.mp4", (frames[:, t] for t in range(5)), 29.97) == 5
    info = probe(tmp_path / "s.mp4")
    assert info.frames == 5
    assert info.fps == pytest.approx(29.97, abs=1e-2)


def test_long_files_are_streamed(tmp_path: Path) -> None:
    _write(tmp_path / "long.mp4", 60)
    iterator = iter_frames(tmp_path / "long.mp4")
    first = next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert torch.equal(first, read_video(tmp_path / "long.mp4", frames=1)[:, 0])


# --- bad files ------------------------------------------------------------------------------------


def _fails(path: Path, message: str) -> None:
    for function in (probe, read_video):
        with pytest.raises(FileFormatError, match=message) as caught:
            function(path)
        text = str(caught.value)
        assert str(path) in text
        assert "\n" not in text


def test_missing_directory_empty_and_foreign_files(tmp_path: Path) -> None:
    _fails(tmp_path / "missing.mp4", "no such file")
    _fails(tmp_path, "is a directory")
    (tmp_path / "empty.mp4").touch()
    _fails(tmp_path / "empty.mp4", r"is empty \(0 bytes\)")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    _fails(tmp_path / "noise.mp4", "is not a readable video file")
    (tmp_path / "text.mp4").write_text("this is not a video\n")
    _fails(tmp_path / "text.mp4", "is not a readable video file")


def test_audio_only_file(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    _fails(tmp_path / "sound.wav", r"holds no video \(audio only\)")


def test_header_without_streams(clip: Path) -> None:
    clip.write_bytes(clip.read_bytes()[:900])
    _fails(clip, "truncated")


def test_frames_that_change_size(tmp_path: Path) -> None:
    """Two H.264 streams of different sizes, one after the other."""
    for index, size in enumerate((32, 48)):
        write_video(tmp_path / f"{index}.mp4", torch.rand(3, 3, size, size))
    path = tmp_path / "joined.h264"
    with path.open("wb") as joined:
        for index in range(2):
            raw = tmp_path / f"{index}.h264"
            with av.open(str(tmp_path / f"{index}.mp4")) as source, av.open(str(raw), "w") as to:
                stream = to.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        to.mux(packet)
            joined.write(raw.read_bytes())
    with pytest.raises(FileFormatError, match=r"change from \(32, 32\) to \(48, 48\)"):
        read_video(path)
    assert read_video(path, size=16).shape == (3, 6, 16, 16)


@pytest.mark.parametrize("suffix", ["avi", "ts"])
def test_zero_length_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    _fails(path, "holds no video|not a readable|empty")


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.97])
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("mp4", {}), ("mp4", {"movflags": "faststart"}), ("avi", {})],
    ids=["mp4", "mp4-header-first", "avi"],
)
def test_truncated_files(
    tmp_path: Path, suffix: str, options: dict[str, str], fraction: float
) -> None:
    path = tmp_path / f"cut.{suffix}"
    _write(path, 30, options=options)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    _fails(path, "truncated")


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_truncated_stream_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    _write(path, 30)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FileFormatError, match="truncated or damaged near frame"):
        read_video(path)


def test_too_short_for_the_request(clip: Path) -> None:
    with pytest.raises(FileFormatError, match=r"too short: 13 frames asked for .* found 12"):
        read_video(clip, frames=13)
    with pytest.raises(FileFormatError, match="too short: at least one frame"):
        read_video(clip, start=12)


def test_pyav_missing_names_the_extra(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"magvit_fast\[video\]"):
        probe(clip)


# --- bad arguments and bad destinations -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"frames": 0}, "frames"),
        ({"size": 0}, "size"),
        ({"size": (4, -1)}, "size"),
        ({"start": -1}, "start"),
        ({"stride": 0}, "stride"),
    ],
)
def test_bad_read_arguments(clip: Path, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        read_video(clip, **arguments)


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (torch.rand(1, 2, 8, 8), {}, "video: expected"),
        (torch.rand(3, 0, 8, 8), {}, "video: expected"),
        (torch.rand(3, 8, 8), {}, "video: expected"),
        (torch.full((3, 1, 8, 8), float("nan")), {}, "finite"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.int64), {}, "float in"),
        (torch.rand(3, 1, 8, 8), {"fps": 0}, "fps: expected"),
        (torch.rand(3, 1, 8, 8), {"crf": 60}, "crf: expected"),
    ],
)
def test_bad_write_arguments(
    tmp_path: Path, video: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "x.mp4", video, **options)
    assert not list(tmp_path.iterdir())


def test_frames_of_unequal_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at frame 1"):
        write_frames(tmp_path / "x.mp4", [torch.rand(3, 8, 8), torch.rand(3, 8, 10)])
    assert not list(tmp_path.iterdir())


def test_a_failing_source_of_frames_leaves_nothing(tmp_path: Path) -> None:
    def frames() -> Any:
        yield torch.rand(3, 8, 8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_frames(tmp_path / "x.mp4", frames())
    assert not list(tmp_path.iterdir())


def test_full_disk_while_encoding(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(FileWriteError, match=r"cannot write .*x.mp4: File too large"):
            write_video(path, torch.rand(3, 20, 64, 64), crf=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mp4"]


def test_images_come_back_exactly(tmp_path: Path) -> None:
    for height, width in ((16, 24), (7, 5), (1, 1)):
        generator = torch.Generator().manual_seed(height)
        pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        for image in (pixels, pixels.float() / 255):
            write_image(tmp_path / "image.png", image)
            back = read_video(tmp_path / "image.png")
            assert torch.equal((back[:, 0] * 255).round().to(torch.uint8), pixels)
    with pytest.raises(ValueError, match=r"frame: expected \[3, H, W\]"):
        write_image(tmp_path / "bad.png", torch.zeros(1, 4, 4))
    with pytest.raises(FileWriteError):
        write_image(tmp_path / "image.png" / "x.png", pixels)
    assert not (tmp_path / "bad.png").exists()
