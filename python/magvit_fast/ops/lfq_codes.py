"""lfq_codes: the -1 / +1 channels of an index, the inverse of lfq_quantize's packing.

Next hop: `_core.lfq_codes_forward` / `_core_cuda.lfq_codes_forward` (csrc/lfq_codes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks
from magvit_fast.ops.lfq_quantize import MAX_CHANNELS

# --- contract ---------------------------------------------------------------------------------
# indices int64 [...] -> codes, the shape of indices with an axis of num_bits inserted at channel_dim,
# contiguous. Channel c is +1 where bit(c) of the index is set, else -1; bit(c) = c ("lsb") or
# num_bits - 1 - c ("msb"). An index outside [0, 2**num_bits) has no code: its channels are NaN, and a
# ValueError says so where that can be known without waiting for a device.


# --- reference --------------------------------------------------------------------------------
def reference(
    indices: Tensor, num_bits: int, axis: int, bit_order: str, dtype: torch.dtype
) -> Tensor:
    """Plain torch, any floating dtype."""
    shifts = torch.arange(num_bits, device=indices.device)
    if bit_order == "msb":
        shifts = shifts.flip(0)
    bits = (indices.unsqueeze(-1) >> shifts) & 1
    codes = (bits * 2 - 1).to(dtype)
    codes = codes.masked_fill(((indices >> num_bits) != 0).unsqueeze(-1), torch.nan)
    return codes.movedim(-1, axis).contiguous()


def _complain(indices: Tensor, num_bits: int, position: int) -> None:
    index = _checks.unravel(position, indices.shape)
    raise ValueError(
        f"indices: expected values in [0, 2**{num_bits}), got {int(indices[index])} at {index}"
    )


# --- schema and fake --------------------------------------------------------------------------
_native.LIB.define(
    "lfq_codes(Tensor indices, int num_bits, int channel_dim, bool msb_first, ScalarType dtype) -> Tensor"
)


def _codes_shape(indices: Tensor, num_bits: int, channel_dim: int) -> list[int]:
    return [*indices.shape[:channel_dim], num_bits, *indices.shape[channel_dim:]]


def _fake(
    indices: Tensor, num_bits: int, channel_dim: int, msb_first: bool, dtype: torch.dtype
) -> Tensor:
    return indices.new_empty(_codes_shape(indices, num_bits, channel_dim), dtype=dtype)


torch.library.register_fake("magvit_fast::lfq_codes", _fake, lib=_native.LIB)


# --- launch -----------------------------------------------------------------------------------
def _launch(
    indices: Tensor, num_bits: int, channel_dim: int, msb_first: bool, dtype: torch.dtype
) -> Tensor:
    indices = indices.contiguous()
    codes = indices.new_empty(_codes_shape(indices, num_bits, channel_dim), dtype=dtype)
    outer, inner = indices.shape[:channel_dim].numel(), indices.shape[channel_dim:].numel()
    bad = _checks.no_bad_position(indices.device)
    _native.trace("lfq_codes", shape=tuple(indices.shape), dtype=dtype, device=indices.device)
    core, where, how = _native.launcher(indices.device)
    core.lfq_codes_forward(
        indices.data_ptr(), codes.data_ptr(), bad.data_ptr(), outer, num_bits, inner,
        _native.dtype_code(dtype), msb_first, where, how,
    )  # fmt: skip
    _native.finish(indices.device)
    position = _checks.first_bad_position(bad)
    if position is not None:
        _complain(indices, num_bits, position)
    return codes


_native.LIB.impl("lfq_codes", _launch, "CPU")
_native.LIB.impl("lfq_codes", _launch, "CUDA")
_OP = torch.ops.magvit_fast.lfq_codes.default


# --- autograd ---------------------------------------------------------------------------------
# None: indices are integers.


# --- public -----------------------------------------------------------------------------------
def lfq_codes(
    indices: Tensor,
    num_bits: int,
    *,
    channel_dim: int = 1,
    bit_order: str = "lsb",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Unpack indices into channels of -1 and +1: the code vectors of look-up-free quantization.

    Args:
        indices: int64 [...], values in [0, 2**num_bits), any strides.
        num_bits: 1 to 63.
        channel_dim: where the channel axis goes in the result.
        bit_order: "lsb": channel 0 is the least significant bit; "msb": the most significant.
        dtype: floating dtype of the result.
        impl: "auto", "native" or "reference".

    Returns:
        Codes with an axis of num_bits at `channel_dim`, contiguous. On CUDA an index out of range gives NaN
        channels (and a ValueError only with MAGVIT_FAST_SYNC=1).

    Raises:
        ValueError: num_bits, bit_order or channel_dim out of range; an index out of range (on the CPU).
        TypeError: indices are no int64 tensor, or dtype is no floating dtype.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737) section 3.1.
    """
    _checks.check_tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected dtype torch.int64, got {indices.dtype}")
    _checks.check_int("num_bits", num_bits)
    _checks.check_int("channel_dim", channel_dim)
    if not 1 <= num_bits <= MAX_CHANNELS:
        raise ValueError(f"num_bits: expected 1 to {MAX_CHANNELS}, got {num_bits}")
    _checks.check_choice("bit_order", bit_order, ("lsb", "msb"))
    if dtype not in _checks.FLOATS:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    dims = indices.dim() + 1
    if not -dims <= channel_dim < dims:
        raise ValueError(f"channel_dim: {channel_dim} is out of range for a result of {dims} dims")
    axis = channel_dim % dims
    obstacle = _native.native_dtype_obstacle(dtype) or _native.missing_core(indices.device)
    if _native.use_native("lfq_codes", impl, obstacle):
        return _OP(indices, num_bits, axis, bit_order == "msb", dtype)  # type: ignore[no-any-return]
    if not torch.compiler.is_compiling() and indices.device.type == "cpu":
        bad = ((indices >> num_bits) != 0).flatten().nonzero()
        if bad.numel():
            _complain(indices, num_bits, int(bad[0]))
    return reference(indices, num_bits, axis, bit_order, dtype)
