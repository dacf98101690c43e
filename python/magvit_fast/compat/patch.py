"""patch(): native kernels inside the models people already run, in place, and back again.

Recognition is by what a module does, not by its name: a convolution of any class is taken where its
class hands over to PyTorch's own `_conv_forward` (native.py; what the class does around it is kept, or
found out and made part of the call, folding.py), and any module that calls convolutions or group norms as
functions by catching these calls (routing.py); a group norm if its forward is PyTorch's own; a quantizer if
it is the LFQ of vector-quantize-pytorch with options that our op serves. Everything else of those kinds is
left alone and listed with the reason. Source of the facts on third-party models: their code as run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from magvit_fast.compat import folding, native, routing, verification

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PATCHABLE = ("causal_conv3d", "group_norm_silu", "lfq")


@dataclass(frozen=True)
class Entry:
    """One module of the report: its name in the model, its class, the op, and what was done or why not."""

    name: str
    module: str
    op: str
    note: str


@dataclass
class PatchReport:
    """What `patch` did.

    Attributes:
        swapped: modules that now run native kernels.
        left: modules of the same kinds that were left alone, each with the reason.
    """

    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def count(self, op: str) -> int:
        """How many modules now run this op."""
        return sum(entry.op == op for entry in self.swapped)

    def __str__(self) -> str:
        lines = [f"{self.count(op)} x {op}" for op in PATCHABLE if self.count(op)]
        lines = ["swapped: " + (", ".join(lines) or "nothing")]
        if self.left:
            lines.append(f"left alone: {len(self.left)}")
            lines += [f"  {e.name} ({e.module}): {e.note}" for e in self.left]
        return "\n".join(lines)


# --- recognition ------------------------------------------------------------------------------
def _conv_kind(module: Any) -> tuple[type, str | None]:
    """(mixin, obstacle): by `_conv_forward` where it is sure to be called, else by routing."""
    if isinstance(module, LazyModuleMixin):  # its first call sets its class, ours would be lost
        return native.NativeConv, "not initialized; run the model once and patch it again"
    if module.weight.is_complex():
        return native.NativeConv, "complex weights"
    base = next(c for c in CONVOLUTIONS if isinstance(module, c))
    own = type(module)._conv_forward is not base._conv_forward
    if own or routing.calls_functions(module) or module.padding_mode not in native.PAD_MODES:
        return routing.Routed, None
    return (folding.FoldedConv if folding.pads_itself(module) else native.NativeConv), None


def _is_lfq(module: nn.Module) -> bool:
    return any(
        c.__name__ == "LFQ" and c.__module__.startswith("vector_quantize_pytorch.")
        for c in type(module).__mro__
    )


def _find(module: nn.Module) -> tuple[str, type, str | None] | None:
    """(op, mixin, obstacle) for a module of a kind that is patched; None for any other."""
    if isinstance(module, CONVOLUTIONS):
        return "causal_conv3d", *_conv_kind(module)
    if isinstance(module, nn.GroupNorm):
        plain = type(module).forward is nn.GroupNorm.forward
        return "group_norm_silu", native.NativeGroupNorm if plain else routing.Routed, None
    if _is_lfq(module):
        from magvit_fast.compat import vector_quantize_pytorch as ours

        return "lfq", ours.NativeLFQ, ours.obstacle(module)
    if isinstance(module, TRANSPOSED):
        return "causal_conv3d", routing.Routed, "transposed convolutions are not served"
    if routing.calls_functions(module):
        return "causal_conv3d", routing.Routed, None
    return None


def _selected(ops: Iterable[str] | None) -> tuple[str, ...]:
    if ops is None:
        return PATCHABLE
    chosen = (ops,) if isinstance(ops, str) else tuple(ops)
    for op in chosen:
        if op not in PATCHABLE:
            raise ValueError(f"ops: expected some of {', '.join(PATCHABLE)}, got {op!r}")
    return chosen


# --- patching ---------------------------------------------------------------------------------
def patch(
    model: nn.Module,
    *,
    ops: Iterable[str] | None = None,
    verify: bool = False,
    channels_last: bool = False,
) -> PatchReport:
    """Swap what is recognized in `model` for native modules, in place; `unpatch` takes it back.

    Parameters, buffers, state_dict keys, hooks, `isinstance` and optimizers stay as they are: a
    swapped module is the same object with a subclass of its own class. Patching twice does nothing more.

    Args:
        model: any module tree, on any device, in training or evaluation mode.
        ops: which of "causal_conv3d" (all convolutions, and other modules that call them as functions),
            "group_norm_silu" (nn.GroupNorm, with an nn.SiLU right behind it in an nn.Sequential) and
            "lfq"; None for all.
        verify: run each module on random input before and after, against float64, and refuse the swap
            whose error is more than twice the old one (in float32 and above the convolution's stated
            1e-5 of the largest value), or for which no input is found. Leaves the global generators as
            they are.
        channels_last: also store the weights of swapped 2D and 3D convolutions in channels-last order.
            By PyTorch's own rule a convolution's result then has that order too, so that no layer
            between two convolutions transposes: faster, but a model that calls `.view` on its
            activations may raise. The values do not change.

    Returns:
        PatchReport: the modules swapped, and those left alone with the reason.

    Raises:
        TypeError, ValueError: model is no module; an op of another name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    chosen, report = _selected(ops), PatchReport()
    for name, module in model.named_modules():
        found = None if native.own_class(module) is not None else _find(module)
        if found is None or found[0] not in chosen:
            continue
        op, mixin, obstacle = found
        kind, note = type(module).__name__, ""
        if obstacle is None:
            module.__class__ = native.native_class(type(module), mixin)
            note = "its functional calls are native" if mixin is routing.Routed else "native"
            obstacle = verification.disagreement(module) if verify else None
            if obstacle is not None:
                _restore(module)
            elif channels_last and isinstance(module, CONVOLUTIONS):
                _reorder(module)
        if obstacle is None:
            report.swapped.append(Entry(name, kind, op, note))
        else:
            report.left.append(Entry(name, kind, op, obstacle))
    if "causal_conv3d" in chosen:
        _fold_wrappers(model)
    if "group_norm_silu" in chosen:
        _fuse_activations(model)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every module that `patch` swapped its own class back; returns how many there were."""
    swapped = [m for m in model.modules() if native.own_class(m) is not None]
    helpers = (native.PassedThrough, folding.FoldedWrapper)
    count = sum(not isinstance(module, helpers) for module in swapped)
    for module in swapped:
        _restore(module)
    return count


def _restore(module: nn.Module) -> None:
    own = native.own_class(module)
    assert own is not None
    module.__class__ = own
    module.__dict__.pop("native_activation", None)
    if module.__dict__.pop("_magvit_fast_reordered", False):
        module.weight.data = module.weight.data.contiguous()  # type: ignore[operator]


def _reorder(module: Any) -> None:
    """Store the weight in channels-last order; `_restore` takes it back."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(module.weight.dim())
    if order is not None and module.weight.is_contiguous():
        module.weight.data = module.weight.data.contiguous(memory_format=order)
        module._magvit_fast_reordered = True


def _fold_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        if native.own_class(module) is None and folding.wraps_convolution(module):
            module.__class__ = native.native_class(type(module), folding.FoldedWrapper)


def _fuse_activations(model: nn.Module) -> None:
    """In nn.Sequential, the SiLU right behind a native group norm becomes part of it.

    Only where the container's forward is PyTorch's own and both modules stand in the tree once and
    have no hooks: then nobody else can see what is between them.
    """
    places: dict[int, int] = {}
    for container in model.modules():
        for child in container._modules.values():  # children() would count a shared one once
            places[id(child)] = places.get(id(child), 0) + 1
    for container in model.modules():
        if type(container).forward is not nn.Sequential.forward:
            continue
        children = list(container)  # type: ignore[call-overload]
        for norm, silu in itertools.pairwise(children):
            alone = places[id(norm)] == places[id(silu)] == 1
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (norm, silu))
            native_norm = isinstance(norm, native.NativeGroupNorm) and not norm.native_activation
            if native_norm and type(silu) is nn.SiLU and alone and not hooked:
                norm.native_activation = "silu"
                silu.__class__ = native.native_class(nn.SiLU, native.PassedThrough)
