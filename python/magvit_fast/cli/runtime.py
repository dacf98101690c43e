"""What the commands share: device, threads, implementation, the models, and how results are shown."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.data.atomic import check_writable
from magvit_fast.data.clips import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from magvit_fast.data.video import write_frames, write_image
from magvit_fast.errors import FileFormatError, MissingExtraError
from magvit_fast.models import VideoTransformer
from magvit_fast.models import load_tokenizer as load_stored
from magvit_fast.models import load_transformer as load_stored_transformer
from magvit_fast.models.tokenizers import VideoTokenizer

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo"
_MP4_SUFFIXES = frozenset([".mp4", ".m4v"])


@dataclass(frozen=True)
class Outcome:
    """Result of a command: facts for `--json`, and the same for people."""

    facts: Mapping[str, Any]
    text: str


def to_json(facts: Mapping[str, Any]) -> str:
    """Strict JSON: numbers that it cannot express (PSNR of equal videos) become null."""
    return json.dumps(_finite(facts), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Mapping[str, object]) -> str:
    """Two aligned columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


# --- device, threads, implementation --------------------------------------------------------------


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where and how to run")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N",
    )
    group.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    group.add_argument(
        "--impl",
        choices=("auto", "native", "reference"),
        default=_native.current_impl(),
        help="native kernels or the pure-PyTorch reference; auto takes native where it exists",
    )


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[torch.device]:
    """Apply the run-time options inside the block, without gradients; yields the device."""
    device = pick_device(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        with _native.default_impl(args.impl), torch.inference_mode():
            yield device
    finally:
        torch.set_num_threads(threads)


def pick_device(name: str) -> torch.device:
    """Raises ValueError for an unknown or absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device: {name!r} is not there: torch {torch.__version__} sees {count} GPUs"
            )
    return device


@dataclass(frozen=True)
class Processes:
    """Which of `count` processes this one is, and the device that it has for itself."""

    rank: int
    count: int
    device: torch.device


@contextlib.contextmanager
def several_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun or `accelerate launch` has started; alone without them.

    Raises MissingExtraError: there are several, but accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Processes(0, 1, device)
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "train", "working in several processes") from error
    from magvit_fast.metrics.gather import PATIENCE  # it loads torch.distributed

    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    try:
        own = device if device.type == "cpu" else state.device
        yield Processes(state.process_index, state.num_processes, own)
    finally:
        state.destroy_process_group()


def implementation(device: torch.device) -> str:
    """What runs there now where an op has both: "native" or "reference"."""
    if _native.current_impl() == "reference" or _native.missing_core(device) is not None:
        return "reference"
    return "native"


def positive_int(text: str) -> int:
    """argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {value}")
    return value


def frame_size(text: str) -> tuple[int, int]:
    """argparse type: "64" or "128x96" (height x width)."""
    parts = text.lower().split("x")
    try:
        height, width = (int(part) for part in (parts if len(parts) == 2 else parts * 2))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N or HEIGHTxWIDTH, got {text!r}") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected positive sizes, got {text!r}")
    return height, width


def check_output(path: str | Path, *inputs: str | Path | None) -> None:
    """Find trouble with the destination before the work and not after it.

    Raises FileWriteError (a directory, no place to write) and ValueError (it is also an input).
    """
    path = Path(path)
    for source in inputs:
        if source is not None and path.exists() and path.samefile(source):
            raise ValueError(f"--output: {path} is also the input; choose another name")
    check_writable(path)


def write_result(
    path: str | Path, frames: Iterator[Tensor], count: int, fps: float, *, crf: float = 18.0
) -> int:
    """Write frames [3, H, W]: one as a PNG file if `path` ends in .png, else an MP4 file of them all.

    count: how many are expected, see `check_result_name`. Returns how many were written.
    """
    check_result_name(path, count)
    if Path(path).suffix.lower() == ".png":
        write_image(path, next(frames))
        return 1
    return write_frames(path, frames, fps, crf=crf)


def check_result_name(path: str | Path, count: int) -> None:
    """Raise ValueError for a name that promises another kind of file than `count` frames become.

    Names without a suffix, and suffixes of no video and no image, say nothing and hold an MP4 file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        if count != 1:
            raise ValueError(
                f"--output: a .png holds one image, but the result has {count} frames; "
                "give a name that ends in .mp4"
            )
    elif suffix in (VIDEO_SUFFIXES | IMAGE_SUFFIXES) - _MP4_SUFFIXES:
        raise ValueError(
            f"--output: expected a name that ends in .mp4 (a video) or .png (a single image), "
            f"got {suffix}"
        )


# --- models ---------------------------------------------------------------------------------------


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="directory or hub id of the tokenizer (default: the small one that comes along)",
    )


def add_transformer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transformer",
        metavar="DIR",
        help="directory or hub id of the masked transformer (default: the one that comes along)",
    )


def load_tokenizer(source: str | None, device: torch.device) -> VideoTokenizer:
    """Of any system, ready for inference. Raises FileFormatError (missing, damaged, foreign)."""
    return load_stored(_source(source, "tokenizer")).to(device).eval()


def load_transformer(source: str | None, device: torch.device) -> VideoTransformer:
    """Of any system, ready for inference. Raises FileFormatError (missing, damaged, foreign)."""
    return load_stored_transformer(_source(source, "transformer")).to(device).eval()


def _source(source: str | None, kind: str) -> str:
    if source is not None:
        return source
    shipped = DEMO_MODEL / kind
    if not shipped.is_dir():
        raise FileFormatError(
            f"{shipped}: the model that comes along is missing from this installation; "
            f"install again or give --{kind} DIR"
        )
    return str(shipped)
