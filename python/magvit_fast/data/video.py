"""Video files through PyAV (FFmpeg): probe, read, decode frame by frame, write H.264.

Frames leave this module as RGB with the file's rotation applied; files are written whole or not at
all. PyAV is imported at first use, so that the package works without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from magvit_fast.data.atomic import atomic_path
from magvit_fast.data.seeking import (
    Keyframes,
    KeyframeScan,
    candidates,
    keyframes_before,
    times_are_stored,
)
from magvit_fast.errors import FileFormatError, MissingExtraError

PathLike = str | os.PathLike[str]

_DEFAULT_FPS = Fraction(25)  # for raw streams, which state none
_HIGHEST_FPS = 1000
_WORTH_SEEKING = 32  # frames; fewer are decoded faster than their packets are looked at
# How files written here describe their pixels: BT.601 matrix, limited range (FFmpeg's numbers).
_SMPTE170M, _LIMITED_RANGE = 6, 1


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. `frames` is counted, not read off; the size is after rotation.

    keyframes: (frame number, time stamp) of those that decoding can begin at; see seeking.py.
    """

    path: str
    frames: int
    fps: float
    width: int
    height: int
    codec: str
    keyframes: Keyframes = ()

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "reading and writing video files") from error
    return av


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileFormatError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise FileFormatError(f"{path}: is a directory; give the path of one video file")
    if not os.access(path, os.R_OK):
        raise FileFormatError(f"{path}: cannot be read; check its permissions")
    if path.is_file() and path.stat().st_size == 0:
        raise FileFormatError(f"{path}: is empty (0 bytes); copy or download it again")


@contextlib.contextmanager
def _open_video(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream."""
    av, path = _av(), Path(path)
    _check_file(path)
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{path}: is not a readable video file ({_reason(error)}); "
            "it may be truncated or of another type, re-encode or download it again"
        ) from error
    with container:
        if not container.streams.video:
            kinds = " and ".join(sorted({stream.type for stream in container.streams}))
            found = f"{kinds} only" if kinds else "no stream at all, it may be truncated"
            raise FileFormatError(
                f"{path}: holds no video ({found}); give a file with a video stream"
            )
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise FileFormatError(
                f"{path}: this FFmpeg has no decoder for it; re-encode it as H.264"
            )
        _check_complete(path, stream)
        stream.thread_type = "AUTO"
        yield container, stream


def _check_complete(path: Path, stream: Any) -> None:
    """Compare the header's table of frames (MP4, MOV, AVI) with the file's size: a cut shows."""
    if not path.is_file() or not stream.index_entries:
        return
    last, size = stream.index_entries[-1], path.stat().st_size
    if last.pos + last.size > size:
        raise FileFormatError(
            f"{path}: is truncated ({size} bytes of at least {last.pos + last.size}); "
            "download it again"
        )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _packets(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """Packets of the stream and the final flush. FFmpeg ends a cut file in silence; this raises."""
    count, end = 0, None
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, count, "the data stops inside a frame")
            yield packet
            count += bool(packet.size)
            if packet.size and packet.pts is not None:
                shown_until = packet.pts + (packet.duration or 0)
                end = shown_until if end is None else max(end, shown_until)
    except (_av().FFmpegError, OSError) as error:
        raise _damaged(path, count, _reason(error)) from error
    if len(container.streams) == 1 and container.duration and end is not None:
        first = stream.start_time or 0
        seconds, promised = float((end - first) * stream.time_base), container.duration / 1e6
        if seconds < 0.9 * promised - 2 / float(_fps(stream)):
            raise _damaged(path, count, f"{seconds:.2f} s of {promised:.2f} s are there")


def _damaged(path: Path, count: int, why: str) -> FileFormatError:
    return FileFormatError(
        f"{path}: is truncated or damaged near frame {count} ({why}); "
        "re-encode or download it again"
    )


def _decode(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """Frames in display order. A file cut short raises after its last intact frame."""
    count = 0
    for packet in _packets(path, container, stream):
        try:
            frames = packet.decode()
        except (_av().FFmpegError, OSError) as error:
            raise _damaged(path, count, _reason(error)) from error
        for frame in frames:
            if frame.is_corrupt:
                raise _damaged(path, count, "the decoder had to guess parts of it")
            yield frame
            count += 1
    if count == 0:
        raise FileFormatError(
            f"{path}: holds no video frame (zero length); give a file with frames"
        )


def _rgb(frame: Any) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], upright. The file's color matrix and range are honored by the conversion."""
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # display matrix, counterclockwise degrees
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def _fps(stream: Any) -> Fraction:
    """Frames per second; a rate that no video has (broken time stamps) counts as unknown."""
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return Fraction(rate) if rate and 0 < rate <= _HIGHEST_FPS else _DEFAULT_FPS


def probe(path: PathLike) -> VideoInfo:
    """Facts about the first video stream of a file: one frame is decoded, the others are counted.

    Raises:
        FileFormatError: missing, unreadable, empty, truncated, audio only or zero-length file.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    with _open_video(path) as (container, stream):
        first = next(_decode(path, container, stream))
        height, width = _rgb(first).shape[:2]
        fps, codec = _fps(stream), stream.codec_context.name
    with _open_video(path) as (container, stream):
        scan = KeyframeScan()  # packets are counted: headers may lie or be absent
        for packet in _packets(path, container, stream):
            scan.add(packet)
        keyframes = scan.keyframes() if times_are_stored(container.format.name) else ()
    return VideoInfo(str(path), scan.frames, float(fps), width, height, codec, keyframes)


def iter_frames(
    path: PathLike,
    *,
    size: int | tuple[int, int] | None = None,
    start: int = 0,
    stride: int = 1,
    keyframes: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Tensor]:
    """Decode frame by frame (memory: one frame), for files of any length.

    Args:
        path: video file.
        size: (height, width) or one number for both: the largest centered window of that aspect
            ratio is cut out, then resized with antialiasing. None keeps the file's size.
        start, stride: yield frames start, start + stride, start + 2 * stride, ... Decoding begins
            at a keyframe before `start` where the container has time stamps for that (MP4, MOV,
            MKV, WebM), else at the front; the frames are the same.
        keyframes: VideoInfo.keyframes of this very file, if known; None finds them by reading the
            packets before `start`, without decoding them.

    Yields:
        float32 [C=3, H, W], RGB in [0, 1].

    Raises:
        ValueError: a bad size, start or stride (at the call, before any decoding).
        FileFormatError: see `probe`; a truncated file raises after its last intact frame.
    """
    target = _check_size(size)
    if start < 0:
        raise ValueError(f"start: expected a frame number >= 0, got {start}")
    if stride < 1:
        raise ValueError(f"stride: expected a step >= 1, got {stride}")
    return _iter_frames(Path(path), target, start, stride, keyframes)


def _iter_frames(
    path: Path,
    target: tuple[int, int] | None,
    start: int,
    stride: int,
    keyframes: Sequence[tuple[int, int]] | None,
) -> Iterator[Tensor]:
    shape: torch.Size | None = None
    for frame in itertools.islice(_frames_from(path, start, keyframes), 0, None, stride):
        image = torch.from_numpy(_rgb(frame)).permute(2, 0, 1).float().div_(255.0)
        shape = image.shape if shape is None else shape
        if target is None and image.shape != shape:
            raise FileFormatError(
                f"{path}: its frames change from {tuple(shape[1:])} to {tuple(image.shape[1:])} "
                "pixels on the way; choose one size"
            )
        yield image if target is None else center_crop_resize(image, target)


def _frames_from(
    path: Path, start: int, keyframes: Sequence[tuple[int, int]] | None
) -> Iterator[Any]:
    """Frames start, start + 1, ...: from a keyframe that is found again, else from the front."""
    if keyframes is None:
        keyframes = ()
        if start >= _WORTH_SEEKING:
            with _open_video(path) as (container, stream):
                if times_are_stored(container.format.name):
                    keyframes = keyframes_before(_packets(path, container, stream), start)
    for number, time in candidates(keyframes, start):
        with _open_video(path) as (container, stream):
            frames = _decode_at(path, container, stream, number, time)
            if next(frames, None) is not None:
                yield from itertools.islice(frames, start - number, None)
                return
    with _open_video(path) as (container, stream):
        yield from itertools.islice(_decode(path, container, stream), start, None)


def _decode_at(path: Path, container: Any, stream: Any, number: int, time: int) -> Iterator[Any]:
    """True, then the frames from keyframe `number` on; nothing where seeking does not lead to it."""
    landed, count = False, number
    try:
        container.seek(time, stream=stream, backward=True, any_frame=False)
        for packet in _packets(path, container, stream):
            for frame in packet.decode():
                if not landed:
                    if frame.pts is not None and frame.pts < time:
                        continue  # shown before the keyframe, and broken if it leans on earlier ones
                    if frame.pts != time or not frame.key_frame or frame.is_corrupt:
                        return
                    landed = True
                    yield True
                if frame.is_corrupt:
                    raise _damaged(path, count, "the decoder had to guess parts of it")
                yield frame
                count += 1
    except (_av().FFmpegError, OSError, FileFormatError) as error:
        if landed:
            if isinstance(error, FileFormatError):
                raise
            raise _damaged(path, count, _reason(error)) from error


def _check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size: expected positive (height, width), got {(height, width)}")
    return height, width


def center_crop_resize(frames: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cut the largest centered window of the target's aspect ratio, then resize it (antialiased).

    Args:
        frames: float [..., C, H, W].
        size: (height, width), or one number for both.

    Returns:
        float [..., C, height, width], values kept within [0, 1].
    """
    target = _check_size(size)
    assert target is not None
    *lead, channels, height, width = frames.shape
    scale = min(height / target[0], width / target[1])
    crop_h, crop_w = (
        max(1, min(extent, round(goal * scale)))
        for extent, goal in zip((height, width), target, strict=True)
    )
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    window = frames[..., top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == target:
        return window.contiguous()
    flat = window.reshape(-1, channels, crop_h, crop_w)
    resized = F.interpolate(flat, size=target, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0.0, 1.0).reshape(*lead, channels, *target)


def read_video(
    path: PathLike,
    *,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    start: int = 0,
    stride: int = 1,
    keyframes: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Read a clip.

    Args:
        path: video file.
        frames: how many frames to return; None for all there are.
        size, start, stride, keyframes: see `iter_frames`.

    Returns:
        float32 [C=3, T, H, W], RGB in [0, 1].

    Raises:
        ValueError: bad arguments.
        FileFormatError: see `probe`, and a file with fewer frames than asked for.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected a count >= 1 or None, got {frames}")
    found = iter_frames(path, size=size, start=start, stride=stride, keyframes=keyframes)
    images = list(itertools.islice(found, frames))
    if not images or (frames is not None and len(images) < frames):
        wanted = "at least one frame" if frames is None else f"{frames} frames"
        raise FileFormatError(
            f"{path}: is too short: {wanted} asked for (start {start}, stride {stride}), "
            f"found {len(images)}; give a longer clip"
        )
    return torch.stack(images, dim=1)


def write_video(path: PathLike, video: Tensor, fps: float = 25.0, *, crf: float = 18.0) -> None:
    """Write an H.264 (yuv420p) MP4 file, whole or not at all.

    Args:
        path: destination; an existing file is replaced.
        video: float [C=3, T, H, W] in [0, 1] (clamped), or uint8 in [0, 255].
        fps: frames per second.
        crf: x264's quality, 0 (lossless in its color format) to 51; 18 is visually lossless.

    Odd heights or widths are padded to even by repeating the last row or column (yuv420p halves
    its color planes).

    Raises:
        ValueError: wrong shape, dtype, range or a non-finite value; fps or crf out of range.
        FileWriteError: the destination cannot be written.
        MissingExtraError: PyAV is not installed.
    """
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(
            f"video: expected [3, T, H, W] with no zero size, got {tuple(video.shape)}"
        )
    write_frames(path, video.unbind(dim=1), fps, crf=crf)


def write_frames(
    path: PathLike, frames: Iterable[Tensor], fps: float = 25.0, *, crf: float = 18.0
) -> int:
    """`write_video` for a stream of frames [C=3, H, W] (memory: a few). Returns their count."""
    av = _av()
    if not 0 < fps <= _HIGHEST_FPS:
        raise ValueError(f"fps: expected a rate in (0, {_HIGHEST_FPS}], got {fps}")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf: expected a quality in [0, 51], got {crf}")
    count = 0
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = None
        for frame in frames:
            image = _to_uint8(frame)
            if stream is None:
                stream = _add_h264_stream(container, image.shape, fps, crf)
            elif image.shape != (stream.height, stream.width, 3):
                raise ValueError(
                    f"frames: expected all of size {(stream.height, stream.width)}, "
                    f"got {image.shape[:2]} at frame {count}"
                )
            container.mux(stream.encode(_encodable(image)))
            count += 1
        if stream is None:
            raise ValueError("frames: expected at least one frame, got none")
        container.mux(stream.encode(None))
    return count


def write_image(path: PathLike, image: Tensor) -> None:
    """Write a PNG file, whole or not at all. `read_video` gives its pixels back exactly.

    Args:
        path: destination; an existing file is replaced.
        image: float [C=3, H, W] in [0, 1] (clamped, rounded to 8 bits), or uint8 in [0, 255].

    Raises:
        ValueError: wrong shape, dtype, range or a non-finite value.
        FileWriteError: the destination cannot be written.
        MissingExtraError: PyAV is not installed.
    """
    av = _av()
    padded = _to_uint8(image)
    pixels = np.ascontiguousarray(padded[: image.shape[1], : image.shape[2]])
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = pixels.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    packets = [*codec.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))]
    packets += codec.encode(None)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(bytes(packet) for packet in packets))


def _add_h264_stream(container: Any, shape: tuple[int, ...], fps: float, crf: float) -> Any:
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream(
        "libx264", rate=rate, options={"crf": str(crf), "preset": "medium"}
    )
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuv420p"
    # Say which color matrix and range the pixels are in, so that players give the colors back.
    context = stream.codec_context
    context.colorspace, context.color_range = _SMPTE170M, _LIMITED_RANGE
    return stream


def _encodable(image: NDArray[np.uint8]) -> Any:
    av = _av()
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=av.video.reformatter.Colorspace.ITU601,
        dst_color_range=av.video.reformatter.ColorRange.MPEG,
    )


def _to_uint8(frame: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] float in [0, 1] or uint8 -> uint8 [H, W, 3] with even sizes."""
    if frame.ndim != 3 or frame.shape[0] != 3:
        raise ValueError(f"frame: expected [3, H, W], got {tuple(frame.shape)}")
    if frame.dtype != torch.uint8:
        if not frame.is_floating_point():
            raise ValueError(f"video: expected float in [0, 1] or uint8, got {frame.dtype}")
        if not torch.isfinite(frame).all():
            raise ValueError("video: expected finite values, got NaN or infinity")
        frame = frame.detach().float().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    image = frame.permute(1, 2, 0).cpu().numpy()
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
