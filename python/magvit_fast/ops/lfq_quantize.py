"""lfq_quantize: look-up-free quantization, the sign of every channel and the packed bits.

Next hop: `_core.lfq_quantize_forward` / `_core_cuda.lfq_quantize_forward` (csrc/lfq_quantize).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks
from magvit_fast.ops._layout import walked_alike, without_axis

# --- contract ---------------------------------------------------------------------------------
# z [..., D at channel_dim, ...] -> quantized, shape, dtype and strides of z, in {-1, +1};
# indices int64, shape of z without the channel axis.
# quantized = +1 where z > 0, else -1 (so 0 and NaN give -1; the paper's convention).
# index = sum over channels c of 2**bit(c) * [z_c > 0], bit(c) = c ("lsb") or D - 1 - c ("msb").

MAX_CHANNELS = 63  # the bits of a non-negative int64


# --- reference --------------------------------------------------------------------------------
def reference(z: Tensor, channel_dim: int, bit_order: str) -> tuple[Tensor, Tensor]:
    """Plain torch, any floating dtype; no gradient (the straight-through estimator is outside)."""
    positive = z > 0
    one = torch.ones((), dtype=z.dtype, device=z.device)
    quantized = torch.where(positive, one, -one)
    powers = 2 ** torch.arange(z.shape[channel_dim], device=z.device)
    if bit_order == "msb":
        powers = powers.flip(0)
    return quantized, (positive.movedim(channel_dim, -1) * powers).sum(-1)


# --- schema and fake --------------------------------------------------------------------------
_native.LIB.define("lfq_quantize(Tensor z, int channel_dim, bool msb_first) -> (Tensor, Tensor)")


def _fake(z: Tensor, channel_dim: int, msb_first: bool) -> tuple[Tensor, Tensor]:
    indices = z.new_empty(without_axis(z, channel_dim), dtype=torch.int64)
    return torch.empty_like(z), indices


torch.library.register_fake("magvit_fast::lfq_quantize", _fake, lib=_native.LIB)


# --- launch -----------------------------------------------------------------------------------
def _launch(z: Tensor, channel_dim: int, msb_first: bool) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(z)
    source, written, block = walked_alike(z, quantized, channel_dim)
    indices = z.new_empty(without_axis(z, channel_dim), dtype=torch.int64)
    _native.trace("lfq_quantize", shape=tuple(z.shape), dtype=z.dtype, device=z.device)
    core, where, how = _native.launcher(z.device)
    core.lfq_quantize_forward(
        source.data_ptr(), written.data_ptr(), indices.data_ptr(), *block,
        _native.dtype_code(z.dtype), msb_first, where, how,
    )  # fmt: skip
    _native.finish(z.device)
    return quantized if written is quantized else quantized.copy_(written), indices


_native.LIB.impl("lfq_quantize", _launch, "CPU")
_native.LIB.impl("lfq_quantize", _launch, "CUDA")
_OP = torch.ops.magvit_fast.lfq_quantize.default


# --- autograd ---------------------------------------------------------------------------------
class _StraightThrough(torch.autograd.Function):
    """d quantized / d z = 1 (the straight-through estimator, MAGVIT-v2 section 3.1)."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, channel_dim: int, bit_order: str, native: bool
    ) -> tuple[Tensor, Tensor]:
        if native:
            quantized, indices = _OP(z, channel_dim, bit_order == "msb")
        else:
            quantized, indices = reference(z, channel_dim, bit_order)
        ctx.mark_non_differentiable(indices)
        return quantized, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


# --- public -----------------------------------------------------------------------------------
def lfq_quantize(
    z: Tensor, *, channel_dim: int = 1, bit_order: str = "lsb", impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize every channel to its sign and pack the signs into an index.

    Args:
        z: [..., D, ...] with the D <= 63 bits at `channel_dim`; any floating dtype, any strides.
        bit_order: "lsb": channel 0 is the least significant bit (MAGVIT-v2's formula, the port of
            Google, Open-MAGVIT2); "msb": the most significant (vector-quantize-pytorch).
        impl: "auto", "native" or "reference".

    Returns:
        quantized in {-1, +1}, like z, with the straight-through gradient; and indices, int64, the
        shape of z without its channel axis. z <= 0 gives -1 (paper; Google's port gives +1 at 0).

    Raises:
        ValueError: more than 63 channels, an unknown bit order or an axis out of range.
        TypeError: z is not a floating-point tensor.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737) section 3.1.
    """
    _checks.check_tensor("z", z, floating=True)
    axis = _checks.channel_axis(z, channel_dim)
    _checks.check_choice("bit_order", bit_order, ("lsb", "msb"))
    if not 1 <= z.shape[axis] <= MAX_CHANNELS:
        raise ValueError(
            f"z: expected 1 to {MAX_CHANNELS} channels at dim {axis}, got {z.shape[axis]}"
        )
    obstacle = _native.native_dtype_obstacle(z.dtype) or _native.missing_core(z.device)
    native = _native.use_native("lfq_quantize", impl, obstacle)
    return _StraightThrough.apply(z, axis, bit_order, native)  # type: ignore[no-untyped-call, no-any-return]
