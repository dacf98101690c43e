"""What a causal convolution does with frames, found out by looking at one run of its code.

The module's own code runs on probes of one channel whose frames are random and all different, with the
convolution replaced by a recorder. From the frames that reached the convolution, those that were returned
and those that were kept follows a plan, or `Unknown` where they follow none.

Previous hop: folding.py.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magvit_fast.compat import native

SETTINGS = (int, float, bool, str, tuple, type(None))
_INTERNAL = frozenset(nn.Module().__dict__)


class Run(NamedTuple):
    """Frames start..stop-1 of a source: the tensor arguments, then the tensors kept on the modules."""

    source: int
    start: int
    stop: int


class Plan(NamedTuple):
    """One native call.

    history: the frames in front of the first argument; results: for each value returned, "convolved", the
    frames it is a copy of, or None; state: (owner, attribute, frames or a plain value) kept afterwards.
    """

    padding: list[int]
    time_mode: str
    space_mode: str
    history: tuple[Run, ...]
    results: tuple[Any, ...]
    single: bool
    state: tuple[tuple[int, str, Any], ...]


class Unknown(Exception):
    """The module does something that is no plan."""


def kept(owner: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Any]]]:
    """The tensors and the plain settings among the attributes of a module."""
    tensors, settings = [], []
    for name, value in owner.__dict__.items():
        if name in _INTERNAL:
            continue
        if isinstance(value, Tensor):
            tensors.append((name, value))
        elif isinstance(value, SETTINGS):
            settings.append((name, value))
        elif isinstance(value, list) and all(isinstance(v, int) for v in value):
            settings.append((name, tuple(value)))
        else:
            raise Unknown
    return tensors, settings


# --- looking ----------------------------------------------------------------------------------
class _Recorder:
    """Stands in for `_conv_forward`: keeps what comes, gives random frames of the right size."""

    def __init__(self, conv: Any, generator: torch.Generator) -> None:
        self.conv, self.generator = conv, generator
        self.seen: list[Tensor] = []
        self.given: list[Tensor] = []

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() != 5 or x.shape[:2] != (1, 1):
            raise Unknown
        if weight is not self.conv.weight or bias is not self.conv.bias:
            raise Unknown  # made of the parameters at every call: standardized, scaled, masked
        pads, size = native.pads(self.conv), [1, 1]
        for axis in range(3):
            reach = self.conv.dilation[axis] * (self.conv.kernel_size[axis] - 1)
            room = x.shape[2 + axis] + pads[2 * axis] + pads[2 * axis + 1] - reach - 1
            size.append(room // self.conv.stride[axis] + 1)
        if min(size) < 1:
            raise Unknown
        self.seen.append(x.clone())
        self.given.append(torch.randn(size, generator=self.generator))
        return self.given[-1]


def _twins(owners: list[Any], recorder: _Recorder, probes: list[Tensor]) -> list[Any]:
    """Copies with the modules' own classes, the recorder in place of the convolution, probes as state."""
    twins = []
    for owner in owners:
        own: Any = native.own_class(owner) or type(owner)
        twin: Any = own.__new__(own)
        twin.__dict__.update(owner.__dict__)
        for name, _ in kept(owner)[0]:
            twin.__dict__[name] = probes.pop(0)
        twins.append(twin)
    twins[-1].__dict__["_conv_forward"] = recorder
    if len(twins) > 1:
        twins[0].__dict__["_modules"] = dict.fromkeys(owners[0]._modules, twins[1])
    return twins


def _changes(owners: list[Any], twins: list[Any], before: list[dict[str, Any]]) -> Any:
    """(owner, attribute, value) for what the call left on the twins that was not there before."""
    for index, (twin, old) in enumerate(zip(twins, before, strict=True)):
        if old.keys() - twin.__dict__.keys():
            raise Unknown
        for name, value in twin.__dict__.items():
            if name not in old or value is not old[name]:
                yield index, name, value


class _Frames:
    """Names frames by their content."""

    def __init__(self, probes: list[Tensor]) -> None:
        self.probes, self.size = probes, probes[0].shape[3:]
        self.names: dict[bytes, tuple[int, int]] = {}
        for source, probe in enumerate(probes):
            for t in range(probe.shape[2]):
                self.names[self._content(probe[0, 0, t])] = (source, t)
        if len(self.names) != sum(probe.shape[2] for probe in probes):
            raise Unknown  # too small to tell apart

    @staticmethod
    def _content(frame: Tensor) -> bytes:
        return frame.contiguous().numpy().tobytes()

    def name(self, frame: Tensor) -> tuple[int, int] | None:
        return self.names.get(self._content(frame))

    def runs(self, clip: Any) -> tuple[Run, ...]:
        """A copied clip [1, 1, t, H, W] as runs of source frames."""
        if not isinstance(clip, Tensor) or clip.dim() != 5 or clip.shape[:2] != (1, 1):
            raise Unknown
        if any(
            clip.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in self.probes
        ):
            raise Unknown  # the very tensor, which may be written to
        names = [self.name(frame) for frame in clip[0, 0]]
        if None in names or not names:
            raise Unknown
        return _joined(names)

    def padded(self, windows: list[Tensor]) -> tuple[list[int], str, list[list[Any]]]:
        """(top, bottom, left, right), mode and names (None: zeros) of recorded clips."""
        height, width = self.size
        rows, columns = (windows[0].shape[3 + i] - self.size[i] for i in range(2))
        if min(rows, columns) < 0 or any(w.shape[3:] != windows[0].shape[3:] for w in windows):
            raise Unknown
        for top, left in itertools.product(range(rows + 1), range(columns + 1)):
            pads = [top, rows - top, left, columns - left]
            inner = [w[0, 0, :, top : top + height, left : left + width] for w in windows]
            names = [[self.name(frame) for frame in clip] for clip in inner]
            if not any(any(clip) for clip in names):
                continue
            for mode in native.PAD_MODES if rows + columns else ("zeros",):
                if mode == "reflect" and (max(pads[:2]) >= height or max(pads[2:]) >= width):
                    continue
                again = [
                    native.pad_plane(clip, pads, mode) == window[0, 0]
                    for clip, window in zip(inner, windows, strict=True)
                ]
                if all(bool(same.all()) for same in again):
                    self._check_zeros(inner, names)
                    return pads, mode, names
        raise Unknown

    @staticmethod
    def _check_zeros(clips: list[Tensor], names: list[list[Any]]) -> None:
        for clip, of_clip in zip(clips, names, strict=True):
            if any(n is None and bool(frame.any()) for frame, n in zip(clip, of_clip, strict=True)):
                raise Unknown


def _joined(names: list[Any]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for source, t in names:
        if runs and runs[-1].source == source and runs[-1].stop == t:
            runs[-1] = runs[-1]._replace(stop=t + 1)
        else:
            runs.append(Run(source, t, t + 1))
    return tuple(runs)


# --- concluding -------------------------------------------------------------------------------
def _one_clip(windows: list[list[Any]], given: list[Tensor], stride: int) -> list[Any]:
    """Frames of a clip whose convolution is that of all windows, one behind the other."""
    clip: list[Any] = []
    start = 0
    for window, results in zip(windows, given, strict=True):
        shared = clip[start:]
        if start > len(clip) or shared != window[: len(shared)] or len(shared) > len(window):
            raise Unknown
        clip += window[len(shared) :]
        start += results.shape[2] * stride
    return clip


def _in_time(clip: list[Any], frames: int) -> tuple[list[Any], int, int, str]:
    """(frames of history, front, back, time mode) of a clip around the first source's frames."""
    if (0, 0) not in clip:
        raise Unknown
    first = len(clip) - 1 - clip[::-1].index((0, 0))
    count = sum(name == (0, t) for t, name in zip(range(frames), clip[first:], strict=False))
    front, back = clip[:first], clip[first + count :]
    missing = sum(1 for _ in itertools.takewhile(lambda name: name is None, front))
    history = front[missing:]
    if None in history:
        raise Unknown
    if front and all(name == (0, 0) for name in front):
        history, mode = [], "replicate"
    elif missing:
        mode = "zeros"
    else:
        mode = "replicate" if back and back[0] is not None else "zeros"
    if count < frames and back:
        raise Unknown
    end = None if mode == "zeros" else (0, frames - 1)
    if any(name != end for name in back):
        raise Unknown
    return history, len(front), len(back), mode


def _geometry(recorder: _Recorder, frames: _Frames) -> tuple[list[int], str, str, tuple[Run, ...]]:
    conv = recorder.conv
    plane, space_mode, windows = frames.padded(recorder.seen)
    clip = _one_clip(windows, recorder.given, conv.stride[0])
    length = frames.probes[0].shape[2]
    history, front, back, time_mode = _in_time(clip, length)
    own = native.pads(conv)
    if any(own[:2]):
        zeros = conv.padding_mode == "zeros" and not (history or len(windows) > 1)
        if not zeros or (time_mode != "zeros" and front + back):
            raise Unknown
        time_mode = "zeros"
    if any(own[2:]):
        if any(plane) and (space_mode, conv.padding_mode) != ("zeros", "zeros"):
            raise Unknown
        space_mode = conv.padding_mode
    padding = [a + b for a, b in zip(own, [front, back, *plane], strict=True)]
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
    count = (length + padding[0] + padding[1] - reach - 1) // conv.stride[0] + 1
    if count != sum(given.shape[2] for given in recorder.given):
        raise Unknown
    return padding, time_mode, space_mode, _joined(history)


def look(
    owners: list[Any], sources: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Plan:
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(1, 1, *s.shape[2:], generator=generator) for s in sources]
    frames = _Frames([probe.clone() for probe in probes])
    recorder = _Recorder(owners[-1], generator)
    left = list(probes)

    def stand_in(value: Any) -> Any:
        return left.pop(0) if isinstance(value, Tensor) else value

    positional = [stand_in(value) for value in args]
    named = {name: stand_in(value) for name, value in kwargs.items()}
    twins = _twins(owners, recorder, left)
    before = [dict(twin.__dict__) for twin in twins]
    result = type(twins[0]).forward(twins[0], *positional, **named)
    if any(not torch.equal(a, b) for a, b in zip(probes, frames.probes, strict=True)):
        raise Unknown  # it writes to what it is given
    frames.probes = probes  # whose memory nothing may share
    padding, time_mode, space_mode, history = _geometry(recorder, frames)
    convolved = torch.cat(recorder.given, 2)
    single = not isinstance(result, tuple)
    results: list[Any] = []
    for value in (result,) if single else result:
        if isinstance(value, Tensor) and torch.equal(value, convolved):
            results.append("convolved")
        else:
            results.append(None if value is None else frames.runs(value))
    if results.count("convolved") != 1:
        raise Unknown
    state = []
    for owner, name, value in _changes(owners, twins, before):
        if isinstance(value, Tensor):
            value = frames.runs(value)
        elif not isinstance(value, SETTINGS) or isinstance(value, tuple):
            raise Unknown
        state.append((owner, name, value))
    return Plan(padding, time_mode, space_mode, history, tuple(results), single, tuple(state))
