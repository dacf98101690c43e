"""Weights in the order of a kernel, kept for as long as they do not change.

Next hop: `_core.causal_conv3d_{packing,pack,weight_mark}`; ops/causal_conv3d.py asks before every launch.

A tensor met for the second time in the same state is packed and its packed form kept; so a training
step, which meets every state of its weights once or twice, keeps next to nothing. The state is the
storage, the version counter that every in-place operation of torch moves (optimizers, load_state_dict),
and a mark made of the whole tensor up to 4 KiB, else of 64 words from end to end, for what goes past the
counter (writing through `.data`): such a write is missed only if it leaves all of these words alone.
Tensors of inference mode have no counter and are not kept. Entries go when their tensor goes, packed
forms when its storage goes before it; what does not fit in CACHE_BYTES is packed at every call.

On CUDA nothing of this decides whether weights are stale, as the host cannot see what a replayed graph or
a write through `.data` has done: every call asks the device to pack again, whose blocks compare 64 bits
made of all their weights with those of the last time and write only what differs. A form is kept from the
second call on that meets it in one state, so a training step, which meets each form once, keeps none.
What a graph has captured stays until the weight goes; a capture makes no new form.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from magvit_fast import _native

CACHE_BYTES = 256 << 20
DEVICE_CACHE_BYTES = 1 << 30  # the largest tokenizer has 740 MB of 16-bit weights

_lock = threading.RLock()
_entries: dict[int, _Entry] = {}


class _Entry:
    def __init__(self, weight: Tensor, state: tuple[Any, ...], on_device: bool = False) -> None:
        key = id(weight)
        self.on_device = on_device
        self.weight = weakref.ref(weight, lambda _: _forget(key, self_ref))
        self_ref = weakref.ref(self)
        self.state = state
        self.storage = StorageWeakRef(weight.untyped_storage())  # none other gets its `_cdata`
        self.forms: dict[Any, Tensor] = {}
        self.met: set[Any] = set()  # forms asked for, and for which direction
        self.captured: list[Tensor] = []  # graphs hold their addresses

    def nbytes(self) -> int:
        kept = {form.data_ptr(): form.nbytes for form in (*self.forms.values(), *self.captured)}
        return sum(kept.values())


def _forget(key: int, entry: weakref.ref[_Entry]) -> None:
    with _lock:
        if key in _entries and _entries[key] is entry():
            del _entries[key]


def _after_fork() -> None:
    """In the child, where no thread of the parent runs on to release the lock."""
    global _lock
    _lock = threading.RLock()
    for key, entry in list(_entries.items()):
        if not entry.on_device:  # a child may not call CUDA, not even to free
            del _entries[key]


os.register_at_fork(after_in_child=_after_fork)


def held_bytes(on_device: bool = False) -> int:
    """Bytes of packed weights that are kept now, for the CPU's kernels or for CUDA's."""
    with _lock:
        total = 0
        for entry in list(_entries.values()):  # a garbage collection in between may take some away
            if entry.storage.expired():
                entry.forms.clear()  # not what graphs have captured
            if entry.on_device == on_device:
                total += entry.nbytes()
        return total


def _state(weight: Tensor, mark: Callable[[int, int], int]) -> tuple[Any, ...]:
    return (
        weight.untyped_storage()._cdata, weight.data_ptr(), weight._version, weight.dtype,
        weight.shape, weight.stride(), mark(weight.data_ptr(), weight.nbytes),
    )  # fmt: skip


def packed(
    weight: Tensor, kind: Any, nbytes: int, mark: Callable[[int, int], int],
    pack: Callable[[Tensor], None],
) -> Tensor | None:  # fmt: skip
    """The packed form `kind` of weight, made by `pack` where needed; None: not kept, pack as you go.

    Args:
        weight: a tensor on the CPU.
        kind: hashable; with the weight's state it determines the packed form.
        nbytes: size of the packed form.
        mark: the core's function that mixes words of (address, bytes).
        pack: fills a uint8 tensor of nbytes.
    """
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last_3d)
    if weight.is_inference() or not dense:
        return None
    state = _state(weight, mark)
    with _lock:
        entry = _entries.get(id(weight))
        if entry is None or entry.weight() is not weight or entry.state != state:
            _entries[id(weight)] = _Entry(weight, state)
            return None
        if kind in entry.forms:
            return entry.forms[kind]
        if held_bytes() + nbytes > CACHE_BYTES:
            return None
        form = torch.empty(nbytes, dtype=torch.uint8)
        _native.core().advise_huge_pages(form.data_ptr(), nbytes)
        pack(form)
        entry.forms[kind] = form
        return form


def of_conv(
    weight: Tensor, numbers: list[int], forward: bool, beside: Sequence[Tensor | None]
) -> Tensor:
    """The weights of causal_conv3d for its kernel: packed, which `numbers` is then told, or plain.

    Args:
        weight: [C_out, C_in / groups, KT, KH, KW] on any device.
        numbers: what the core reads into a Conv3dShape; the last one says whether weights are packed.
        forward: for the forward pass; else for the input gradient.
        beside: the kernel's other tensors.
    """
    core, where, how = _native.launcher(weight.device)
    on_device = not hasattr(core, "causal_conv3d_weight_mark")  # CUDA's core
    if on_device and any(t is not None and t.data_ptr() % 16 for t in (weight, *beside)):
        return weight.contiguous()  # such addresses choose another kernel than the packing is for
    nbytes, kind = core.causal_conv3d_packing(numbers, forward, where, how)
    if not nbytes:  # the engine wants them plain
        return weight.contiguous()
    kind = (kind, numbers[3], nbytes)  # groups: one tensor may serve several numbers of them

    def pack(form: Tensor) -> None:
        plain = weight.contiguous()
        core.causal_conv3d_pack(plain.data_ptr(), form.data_ptr(), numbers, forward, where, how)

    def mark(address: int, size: int) -> int:
        return int(core.causal_conv3d_weight_mark(address, size, where, how))

    form = (
        _on_device(weight, kind, forward, nbytes, pack)
        if on_device
        else packed(weight, kind, nbytes, mark, pack)
    )
    if form is None:
        return weight.contiguous()
    numbers[-1] = 1
    return form


def _on_device(
    weight: Tensor, kind: Any, forward: bool, nbytes: int, pack: Callable[[Tensor], None]
) -> Tensor | None:
    """As `packed`, where packing again is what finds out whether the form still holds."""
    if weight.is_inference() or not weight.is_contiguous():
        return None
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    state = _state(weight, lambda address, size: 0)
    with _lock:
        entry = _entries.get(id(weight))
        if entry is None or entry.weight() is not weight:
            entry = _entries[id(weight)] = _Entry(weight, state, on_device=True)
        elif entry.state != state:
            captured = entry.captured
            entry = _entries[id(weight)] = _Entry(weight, state, on_device=True)
            entry.captured = captured
        form = entry.forms.get(kind)
        if form is None:
            again = (kind, forward) in entry.met  # one form may serve both directions
            entry.met.add((kind, forward))
            if not again or capturing or held_bytes(True) + nbytes > DEVICE_CACHE_BYTES:
                return None
            form = entry.forms[kind] = torch.zeros(nbytes, dtype=torch.uint8, device=weight.device)
            if weight.is_cuda:  # its zeros may be read on any stream from now on
                torch.cuda.current_stream(weight.device).synchronize()
        if capturing and all(form is not one for one in entry.captured):
            entry.captured.append(form)
    if weight.is_cuda and not capturing:
        form.record_stream(torch.cuda.current_stream(weight.device))
    pack(form)
    return form
