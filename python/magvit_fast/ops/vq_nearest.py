"""vq_nearest: the nearest code vector of every position.

Contract
    z [..., D at channel_dim, ...], codebook [K, D] -> indices int64, the shape of z without its channel axis:
    index = argmin over k of |z - codebook_k|**2, computed in float32 (float64 for float64), the first of
    equals. |z|**2 is the same for all k and is left out, which also keeps digits.
Source
    VQ-VAE (arXiv 1711.00937); the quantizer of MAGVIT v1 and of MaskViT's VQ-GAN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks
from magvit_fast.ops._layout import without_axis

_NO_KERNEL = "this op has no native kernel yet; its reference serves every device"
_CHUNK_ELEMENTS = 1 << 24  # scores held at a time: 64 MiB in float32


def reference(z: Tensor, codebook: Tensor, axis: int) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    flat = z.movedim(axis, -1).reshape(-1, z.shape[axis]).to(wide)  # [N, D]
    codes = codebook.to(wide)  # [K, D]
    norms = codes.square().sum(1)  # [K]
    chunk = max(1, _CHUNK_ELEMENTS // codes.shape[0])
    picks = [torch.addmm(norms, part, codes.T, alpha=-2).argmin(1) for part in flat.split(chunk)]
    return torch.cat(picks).view(without_axis(z, axis))


def vq_nearest(z: Tensor, codebook: Tensor, *, channel_dim: int = 1, impl: str = "auto") -> Tensor:
    """Index of the code vector nearest to each position, by squared Euclidean distance.

    Args:
        z: [..., D, ...] with D features at `channel_dim`; any floating dtype, any strides.
        codebook: [K, D], K >= 1.
        impl: "auto" or "reference"; there is no kernel yet.

    Returns:
        int64, the shape of z without its channel axis; of equally near codes the first. No gradient.

    Raises:
        ValueError: shapes or devices that do not fit, an empty codebook.
        TypeError: z or codebook is not floating.
        NotImplementedError: impl="native".
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
    _native.use_native("vq_nearest", impl, _NO_KERNEL)
    with torch.no_grad(), _checks.without_autocast(z):
        return reference(z.detach(), codebook.detach(), axis)
