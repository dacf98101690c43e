"""verify=True: a patched module on random input, against its own class.

Previous hop: patch.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from magvit_fast.compat import native, routing

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Channels to try on a module whose input is not known: colors, latents, wavelets of two levels.
_CHANNELS = (3, 1, 4, 8, 16, 64, 192)


def disagreement(module: Any) -> str | None:
    """Why the native form of `module` is refused, None where it is as good as the module's own."""
    own = native.own_class(module)
    assert own is not None
    if isinstance(module, routing.Routed):
        return _routed_disagreement(module, own)
    if not isinstance(module, (*_CONVOLUTIONS, nn.GroupNorm)):
        return _lfq_disagreement(module, own)
    x = _probe(module)
    if x.device.type == "meta":
        return None
    conv = isinstance(module, _CONVOLUTIONS)
    norm: Any = module

    def run(cls: Any, convert: Callable[[Tensor], Tensor]) -> Tensor:
        weight, bias = (None if p is None else convert(p) for p in (module.weight, module.bias))
        if conv:
            result: Tensor = cls._conv_forward(module, convert(x), weight, bias)
            return result
        return torch.group_norm(convert(x), norm.num_groups, weight, bias, norm.eps)

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        exact = run(own, Tensor.double)
        plain = run(own, torch.clone)
        ours = run(type(module), torch.clone) if conv else module(x)
    return _excess(ours, plain, exact, conv)


def _probe(module: Any) -> Tensor:
    """A small random input of a convolution or norm, of the module's device and dtype."""
    size: tuple[int, ...] = (2, getattr(module, "num_channels", 0), 3, 5, 4)
    if isinstance(module, _CONVOLUTIONS):
        reach = [
            d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)
        ]  # any padding of a mode that mirrors must fit as well
        size = (2, module.in_channels, *(r + 5 + i for i, r in enumerate(reach)))
    values = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    like = module.weight
    return values.float() if like is None else values.to(like.device, like.dtype)


def _excess(ours: Tensor, plain: Tensor, exact: Tensor, conv: bool) -> str | None:
    scale = float(exact.abs().max())
    error, allowed = (float((v.double() - exact).abs().max()) for v in (ours, plain))
    allowed = 2 * allowed + torch.finfo(plain.dtype).eps * scale
    if conv and plain.dtype == torch.float32:
        allowed = max(allowed, 1e-5 * scale)
    if error <= allowed:
        return None
    return f"on random input its error is {error:.3g}, allowed {allowed:.3g}"


# --- modules of any kind ----------------------------------------------------------------------
def _tried(module: Any) -> Iterator[Tensor]:
    """Inputs for a module of any kind: what a convolution or norm takes, else clips of some channels."""
    if isinstance(module, (*_CONVOLUTIONS, nn.GroupNorm)):
        yield _probe(module)
        return
    like = next((t for t in (*module.parameters(), *module.buffers())), torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    for channels in _CHANNELS:
        clip = torch.randn(1, channels, 9, 16, 16, generator=generator, dtype=torch.float64)
        yield clip.to(like.device, like.dtype if like.is_floating_point() else torch.float32)


def _routed_disagreement(module: Any, own: Any) -> str | None:
    def run(cls: Any, convert: Callable[[Any], Any], x: Tensor) -> Tensor:
        twin = convert(copy.deepcopy(module))
        twin.__class__ = cls
        result: Tensor = twin(convert(x))
        return result

    for x in _tried(module):
        if x.device.type == "meta":
            return None
        with torch.random.fork_rng(), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            try:
                exact = run(own, lambda value: value.double(), x)
                plain = run(own, lambda value: value, x)
            except Exception:  # not an input of this module
                continue
            if isinstance(plain, Tensor):
                return _excess(run(type(module), lambda value: value, x), plain, exact, True)
    return "no input was found to try it on"


# --- quantizers -------------------------------------------------------------------------------
def _lfq_disagreement(module: Any, own: Any) -> str | None:
    """`_disagreement` for a quantizer: ids, codes and losses, as it stands (training or evaluation)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, module.dim, generator=generator).to(module.zero.device)
    x = features.movedim(-1, 1) if module.channel_first else features
    results = []
    for forward in (own.forward, type(module).forward):
        with torch.random.fork_rng(), torch.no_grad():  # a fraction of positions is drawn
            torch.manual_seed(0)
            results.append(forward(module, x, inv_temperature=1.0))
    plain, ours = results
    close = torch.allclose(ours.quantized, plain.quantized, atol=1e-5) and torch.allclose(
        ours.entropy_aux_loss, plain.entropy_aux_loss, atol=2e-5, rtol=1e-4
    )
    if close and torch.equal(ours.indices, plain.indices):
        return None
    return "on random input its ids, codes or losses differ"
