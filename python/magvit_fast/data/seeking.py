"""Keyframes of a video file, so that decoding can begin near a wanted frame and still count exactly.

Frame numbers count shown frames from the front. A keyframe's number is the number of shown frames
whose time stamps lie before its own, which packets tell without being decoded. Every frame shown
after a keyframe can be decoded from it, so counting goes on from there: B-frames, open groups of
pictures (whose leading frames are shown before their keyframe) and variable rates included.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

Keyframes = tuple[tuple[int, int], ...]  # (frame number, time stamp), ascending

# Containers that store the time at which each frame is shown, and give it back after a seek. AVI
# stores the order of decoding alone, raw streams nothing; a seek into an MPEG program or transport
# stream does not lead to a frame for sure (FFmpeg may hand a time stamp to the wrong one).
_TIMED_FORMATS = ("mov", "mp4", "matroska", "webm")
_MOST_KEYFRAMES = 1024  # kept of a file in which (nearly) every frame is one
_REORDERED = 64  # frames that a decoder may hold back: more than any codec does
_ROUND = 256  # packets between two looks


def times_are_stored(format_name: str) -> bool:
    """Whether FFmpeg's name of a container format stands for one with time stamps to rely on."""
    return any(name in _TIMED_FORMATS for name in format_name.split(","))


class KeyframeScan:
    """Takes up the packets of a file in the order they come in."""

    def __init__(self) -> None:
        self.frames = 0  # shown ones
        self._times: list[int] = []
        self._keys: list[int] = []
        self._usable = True

    def add(self, packet: Any) -> None:
        """An av.Packet; empty ones and those whose frame is never shown do not count."""
        if not packet.size or packet.is_discard:
            return
        self.frames += 1
        if packet.pts is None:
            self._usable = False
            return
        self._times.append(packet.pts)
        if packet.is_keyframe:
            self._keys.append(packet.pts)

    def keyframes(self) -> Keyframes:
        """Those taken up so far, at most 1024, evenly; none where time stamps are absent or double."""
        times = sorted(self._times)
        if not self._usable or any(a == b for a, b in itertools.pairwise(times)):
            return ()
        keys = sorted(self._keys)
        step = -(-len(keys) // _MOST_KEYFRAMES) if keys else 1
        return tuple((bisect.bisect_left(times, time), time) for time in keys[::step])

    def settled(self, frame: int, packet: Any) -> bool:
        """Whether no packet after this one can be shown before frame number `frame`.

        No packet is shown before it is decoded: what is still to come has later time stamps than
        this packet's decoding time.
        """
        if self.frames < frame + _REORDERED or self.frames % _ROUND or packet.dts is None:
            return False
        times = sorted(self._times)
        return len(times) > frame and bool(packet.dts > times[frame])


def keyframes_before(packets: Iterable[Any], frame: int) -> Keyframes:
    """Keyframes up to frame number `frame`, from as few of the packets as tell them."""
    scan = KeyframeScan()
    for packet in packets:
        scan.add(packet)
        if scan.settled(frame, packet):
            break
    return tuple(key for key in scan.keyframes() if key[0] <= frame)


def candidates(keyframes: Sequence[tuple[int, int]], frame: int) -> list[tuple[int, int]]:
    """Where to begin for frame number `frame`, best first: the last two keyframes at or before it."""
    end = bisect.bisect_right([number for number, _ in keyframes], frame)
    return [key for key in reversed(keyframes[max(0, end - 2) : end]) if key[0] > 0]
