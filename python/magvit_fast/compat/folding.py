"""Folding: what a causal convolution does around its convolution, as arguments of one native call.

Autoencoders pad in time by hand, join cached frames in front, or convolve one frame at a time, each copying
its input. What they do is a map of frames that depends on sizes and settings only, never on values. So it
is found by looking (frame_plans.py) at the first call of every size: one channel of random frames goes
through the module's own code, a thousandth of what the layer computes. Where the frames follow a plan, such
calls become one call of causal_conv3d with its padding, modes and history; where they follow none, the
module's own code goes on doing the work.

Next hop: native.convolve.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from magvit_fast.compat import native
from magvit_fast.compat.frame_plans import SETTINGS, Plan, Run, Unknown, kept, look

MAX_BYTES = 1 << 30  # larger inputs are split by some models, and left to them
MAX_PLANS = 64  # of one module; a model meets a few sizes

_plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan | None]] = weakref.WeakKeyDictionary()


# --- what a call depends on -------------------------------------------------------------------
def _owners(module: nn.Module) -> list[Any]:
    """The module and, for a wrapper, its convolution, which comes last."""
    return [module] if isinstance(module, nn.Conv3d) else [module, *module.children()]


def _inputs(
    owners: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], Any]:
    """The source tensors of a call, and everything else that its frames may depend on, hashable."""
    sources: list[Tensor] = []
    rest: list[Any] = []
    for value in (*args, *itertools.chain(*kwargs.items())):
        if isinstance(value, Tensor):
            sources.append(value)
        elif not isinstance(value, SETTINGS):
            raise Unknown
        rest.append(None if isinstance(value, Tensor) else (type(value), value))
    for owner in owners:
        tensors, settings = kept(owner)
        sources += [tensor for _, tensor in tensors]
        rest += [tuple(name for name, _ in tensors), tuple(settings)]
    modes = (torch.is_grad_enabled(), *(owner.training for owner in owners))
    first = sources[0]
    if any(s.dim() != 5 or s.dtype != first.dtype or s.device != first.device for s in sources):
        raise Unknown
    return sources, (tuple(s.shape for s in sources), tuple(rest), len(args), modes)


def _plain(owners: list[Any]) -> bool:
    """Whether nothing looks at the call of a wrapper's convolution."""
    conv = owners[-1]
    if len(owners) == 1:
        return "_conv_forward" not in conv.__dict__
    hooks = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks
    return not (hooks or conv._backward_pre_hooks or "forward" in conv.__dict__)


# --- use --------------------------------------------------------------------------------------
def _frames(runs: tuple[Run, ...], sources: list[Tensor]) -> Tensor:
    parts = [sources[run.source][:, :, run.start : run.stop] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _copy(runs: tuple[Run, ...], sources: list[Tensor]) -> Tensor:
    frames = _frames(runs, sources)
    return frames.clone() if len(runs) == 1 else frames


def _plan(
    module: nn.Module, owners: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Plan | None, list[Tensor]]:
    sources, key = _inputs(owners, args, kwargs)
    plans = _plans.setdefault(module, {})
    if key not in plans:
        while len(plans) >= MAX_PLANS:
            del plans[next(iter(plans))]
        try:
            with torch.autocast("cpu", enabled=False):
                plans[key] = look(owners, sources, args, kwargs)
        except Exception:  # whatever third-party code makes of a probe: it keeps doing the work
            plans[key] = None
    return plans[key], sources


def _foldable(owners: list[Any], args: tuple[Any, ...]) -> bool:
    """Whether this call may be one native call at all."""
    conv = owners[-1]
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 5:
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    x = args[0]
    alike = x.dtype == conv.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    large = x.nbytes > MAX_BYTES
    return (
        alike and native.served(x) and not (large or native.by_products(conv, x)) and _plain(owners)
    )


class Folded:
    """Mixin over a convolution with a forward of its own, or over the wrapper of one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        owners = _owners(module)
        plan: Plan | None = None
        sources: list[Tensor] = []
        if _foldable(owners, args):
            try:
                plan, sources = _plan(module, owners, args, kwargs)
            except Unknown:
                plan = None
        if plan is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _run(plan, owners, sources)


def _run(plan: Plan, owners: list[Any], sources: list[Tensor]) -> Any:
    conv = owners[-1]
    convolved = native.convolve(
        conv,
        sources[0],
        padding=plan.padding,
        time_mode=plan.time_mode,
        space_mode=plan.space_mode,
        history=_frames(plan.history, sources) if plan.history else None,
    )
    values = [
        convolved if part == "convolved" else part and _copy(part, sources) for part in plan.results
    ]
    kept = [
        (owners[owner], name, _copy(value, sources) if isinstance(value, tuple) else value)
        for owner, name, value in plan.state
    ]
    for owner, name, value in kept:
        setattr(owner, name, value)
    return values[0] if plan.single else tuple(values)


class FoldedWrapper(Folded):
    """A module that is nothing but code around one patched convolution."""


class FoldedConv(Folded, native.NativeConv):
    """A convolution with a forward of its own: folded where it can be, native in any case."""


def pads_itself(module: nn.Module) -> bool:
    """Whether a convolution has a forward of its own, and no tensors of its own besides."""
    own_forward = isinstance(module, nn.Conv3d) and type(module).forward is not nn.Conv3d.forward
    return own_forward and not module._buffers and not module._modules


def wraps_convolution(module: nn.Module) -> bool:
    """Whether a module is nothing but code of somebody else around one patched 3D convolution."""
    children = list(module.children())
    return (
        len(children) == 1
        and isinstance(children[0], nn.Conv3d)
        and isinstance(children[0], native.NativeConv)
        and not type(module).__module__.startswith("torch.")
        and not module._parameters
        and not module._buffers
    )
