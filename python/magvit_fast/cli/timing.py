"""Wall times of a tokenizer, native against the reference, in one run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.cli.progress import Advance
from magvit_fast.models.tokenizers import VideoTokenizer

_PATIENCE = 30.0  # seconds


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median_seconds(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    *,
    warm: bool = False,
    advance: Advance | None = None,
) -> dict[str, float]:
    """Medians after one warm-up call each; the candidates take turns, so that noise hits all.

    warm: the candidates have run before and need no warm-up call. advance: told of every round of
    them. On a slow machine fewer rounds are made: none starts later than half a minute after the first.
    """
    advance = advance or (lambda count: None)
    for function in () if warm else candidates.values():
        seconds(function, device)
    advance(not warm)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - begin > _PATIENCE:
            break
        for name, function in candidates.items():
            samples[name].append(seconds(function, device))
        advance(1)
    return {name: median(values) for name, values in samples.items()}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that one call holds beyond what is held before it; None where unknown.

    On a GPU as PyTorch's allocator counts; on the CPU the growth of the process's resident memory,
    whose high-water mark Linux resets on request.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for later would hide growth
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    return None


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def tokenizer_seconds(
    tokenizer: VideoTokenizer, video: Tensor, repeats: int, advance: Advance | None = None
) -> dict[str, float]:
    """Medians of encoding and decoding one batch of clips.

    Args:
        tokenizer, video: a clip batch [B, 3, T, H, W] on the tokenizer's device.
        repeats: timed calls of each candidate.
        advance: as in `median_seconds`, repeats + 1 rounds.

    Returns:
        encode_seconds, decode_seconds: with the implementation in use.
        reference_encode_seconds, reference_decode_seconds: all ops in pure PyTorch, the faster of
        contiguous and channels_last_3d memory.
    """
    ids = tokenizer.encode(video)
    codes = tokenizer.quantizer.codes(ids).to(video.dtype)
    contiguous = torch.contiguous_format

    def reference(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with _native.default_impl("reference"):
                return function()

        return run

    def encode_contiguous() -> Tensor:
        z = tokenizer.encoder(video.contiguous(memory_format=contiguous))
        found: Tensor = tokenizer.quantizer(z, with_losses=False).ids
        return found

    def decode_contiguous() -> Tensor:
        decoded: Tensor = tokenizer.decoder(codes.contiguous(memory_format=contiguous))
        return decoded.clamp(0, 1)

    times = median_seconds(
        {
            "encode": lambda: tokenizer.encode(video),
            "encode_channels_last": reference(lambda: tokenizer.encode(video)),
            "encode_contiguous": reference(encode_contiguous),
            "decode": lambda: tokenizer.decode(ids),
            "decode_channels_last": reference(lambda: tokenizer.decode(ids)),
            "decode_contiguous": reference(decode_contiguous),
        },
        video.device,
        repeats,
        advance=advance,
    )
    return {
        "encode_seconds": times["encode"],
        "decode_seconds": times["decode"],
        "reference_encode_seconds": min(times["encode_channels_last"], times["encode_contiguous"]),
        "reference_decode_seconds": min(times["decode_channels_last"], times["decode_contiguous"]),
    }
