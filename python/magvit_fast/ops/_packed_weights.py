"""Weights in the order of a CPU kernel, kept for as long as they do not change.

Next hop: `_core.causal_conv3d_{packing,pack,weight_mark}`; ops/causal_conv3d.py asks before every launch.

A tensor met for the second time in the same state is packed and its packed form kept; so a training
step, which meets every state of its weights once or twice, keeps next to nothing. The state is the
storage, the version counter that every in-place operation of torch moves (optimizers, load_state_dict),
and a mark made of 64 words from all over the tensor, for what goes past the counter (writing through
`.data`): such a write is missed only if it leaves all of these words alone. Tensors of inference mode
have no counter and are not kept. Entries go when their tensor goes; what does not fit in CACHE_BYTES is
packed at every call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from magvit_fast import _native

CACHE_BYTES = 256 << 20

_lock = threading.RLock()
_entries: dict[int, _Entry] = {}


class _Entry:
    def __init__(self, weight: Tensor, state: tuple[Any, ...]) -> None:
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: _forget(key, self_ref))
        self_ref = weakref.ref(self)
        self.state = state
        self.storage = weight.untyped_storage()  # kept alive, so its address means no other storage
        self.forms: dict[Any, Tensor] = {}

    def nbytes(self) -> int:
        return sum(form.nbytes for form in self.forms.values())


def _forget(key: int, entry: weakref.ref[_Entry]) -> None:
    with _lock:
        if key in _entries and _entries[key] is entry():
            del _entries[key]


def held_bytes() -> int:
    """Bytes of packed weights that are kept now."""
    with _lock:
        return sum(entry.nbytes() for entry in _entries.values())


def _state(weight: Tensor, mark: Callable[[int, int], int]) -> tuple[Any, ...]:
    return (
        weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride(),
        mark(weight.data_ptr(), weight.nbytes),
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
        pack(form)
        entry.forms[kind] = form
        return form


def of_conv(weight: Tensor, numbers: list[int], forward: bool) -> Tensor:
    """The weights of causal_conv3d for its CPU kernel: packed, which `numbers` is then told, or plain.

    Args:
        weight: [C_out, C_in / groups, KT, KH, KW] on any device.
        numbers: what the core reads into a Conv3dShape; the last one says whether weights are packed.
        forward: for the forward pass; else for the input gradient.
    """
    core, where, how = _native.launcher(weight.device)
    if not hasattr(core, "causal_conv3d_packing"):  # CUDA's core packs on the device, at every call
        return weight.contiguous()
    nbytes, kind = core.causal_conv3d_packing(numbers, forward, where, how)
    if not nbytes:  # the engine wants them plain
        return weight.contiguous()

    def pack(form: Tensor) -> None:
        plain = weight.contiguous()
        core.causal_conv3d_pack(plain.data_ptr(), form.data_ptr(), numbers, forward, where, how)

    def mark(address: int, size: int) -> int:
        return int(core.causal_conv3d_weight_mark(address, size, where, how))

    form = packed(weight, kind, nbytes, mark, pack)
    if form is None:
        return weight.contiguous()
    numbers[-1] = 1
    return form
