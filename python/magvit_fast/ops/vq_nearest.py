"""vq_nearest: the nearest code vector of every position.

Next hop: `_core.vq_nearest_search` / `_core_cuda.vq_nearest_search` (csrc/vq_nearest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks
from magvit_fast.ops._layout import block_of, without_axis

# --- contract ---------------------------------------------------------------------------------
# z [..., D at channel_dim, ...], codebook [K, D] -> indices int64, the shape of z without its channel
# axis: index = argmin over k of |z - codebook_k|**2, both taken to float32, the first of equals.
# |z|**2 is the same for all k and is left out, which also keeps digits.
# The kernels compare in float32 and decide in float64 what lies closer than float32 can tell, so that
# the CPU at every instruction set and CUDA agree. The reference compares in float32 alone (float64 for
# float64): it may take the other one of two codes that are equally near within its rounding.
# A position with NaN gets 0. Nothing of the size of positions x codes is ever held.
# Source: VQ-VAE (arXiv 1711.00937); the quantizer of MAGVIT v1 and of MaskViT's VQ-GAN.

_CHUNK_ELEMENTS = 1 << 24  # scores that the reference holds at a time: 64 MiB in float32


# --- reference --------------------------------------------------------------------------------
def reference(z: Tensor, codebook: Tensor, axis: int) -> Tensor:
    """Plain torch, any floating dtype."""
    wide = torch.promote_types(z.dtype, torch.float32)
    flat = z.movedim(axis, -1).reshape(-1, z.shape[axis]).to(wide)  # [N, D]
    codes = codebook.to(wide)  # [K, D]
    norms = codes.square().sum(1)  # [K]
    chunk = max(1, _CHUNK_ELEMENTS // codes.shape[0])
    picks = [torch.addmm(norms, part, codes.T, alpha=-2).argmin(1) for part in flat.split(chunk)]
    return torch.cat(picks).view(without_axis(z, axis))


# --- schema and fake --------------------------------------------------------------------------
_native.LIB.define("vq_nearest(Tensor z, Tensor codebook, int channel_dim) -> Tensor")


def _fake(z: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    return z.new_empty(without_axis(z, channel_dim), dtype=torch.int64)


torch.library.register_fake("magvit_fast::vq_nearest", _fake, lib=_native.LIB)


# --- launch -----------------------------------------------------------------------------------
def _launch(z: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    layout = block_of(z, channel_dim)
    if layout is None:
        z = z.contiguous()
        layout = block_of(z, channel_dim)
    assert layout is not None  # a contiguous tensor always has one
    indices = _fake(z, codebook, channel_dim)
    codes = codebook.to(torch.float32).contiguous()
    _native.trace("vq_nearest", z=tuple(z.shape), codebook=tuple(codebook.shape), dtype=z.dtype,
                  device=z.device)  # fmt: skip
    if indices.numel():
        core, where, how = _native.launcher(z.device)
        size = core.vq_nearest_workspace_bytes(*codes.shape, where, how)
        workspace = torch.empty(size, dtype=torch.uint8, device=z.device)
        core.vq_nearest_search(
            z.data_ptr(), codes.data_ptr(), indices.data_ptr(), workspace.data_ptr(), *layout,
            codes.shape[0], _native.dtype_code(z.dtype), where, how,
        )  # fmt: skip
        _native.finish(z.device)
    return indices


_native.LIB.impl("vq_nearest", _launch, "CPU")
_native.LIB.impl("vq_nearest", _launch, "CUDA")
_OP = torch.ops.magvit_fast.vq_nearest.default


# --- autograd ---------------------------------------------------------------------------------
# None: the result is integers.


# --- public -----------------------------------------------------------------------------------
def vq_nearest(z: Tensor, codebook: Tensor, *, channel_dim: int = 1, impl: str = "auto") -> Tensor:
    """Index of the code vector nearest to each position, by squared Euclidean distance.

    Args:
        z: [..., D, ...] with D features at `channel_dim`; any floating dtype, any strides.
        codebook: [K, D], K >= 1; any floating dtype.
        impl: "auto", "native" or "reference".

    Returns:
        int64, the shape of z without its channel axis; of equally near codes the first. No gradient.

    Raises:
        ValueError: shapes or devices that do not fit, an empty codebook.
        TypeError: z or codebook is not floating.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: VQ-VAE (arXiv 1711.00937) section 3.1.
    """
    _checks.check_tensor("z", z, floating=True)
    _checks.check_tensor("codebook", codebook, ndim=2, floating=True)
    _checks.check_same("codebook", codebook, "z", z, dtype=False)
    axis = _checks.channel_axis(z, channel_dim)
    if codebook.shape[0] < 1 or codebook.shape[1] != z.shape[axis]:
        raise ValueError(
            f"codebook: expected shape (K >= 1, {z.shape[axis]}) to fit z {tuple(z.shape)} at dim "
            f"{axis}, got {tuple(codebook.shape)}"
        )
    obstacle = _native.native_dtype_obstacle(z.dtype) or _native.missing_core(z.device)
    native = _native.use_native("vq_nearest", impl, obstacle)
    with torch.no_grad(), _checks.without_autocast(z):
        if native:
            return _OP(z.detach(), codebook.detach(), axis)  # type: ignore[no-any-return]
        return reference(z.detach(), codebook.detach(), axis)
