"""factorized_embedding: a token's embedding as the sum of one row of each sub-table.

Next hop: `_core.factorized_embedding_forward`, `_backward` (csrc/factorized_embedding).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks

# --- contract ---------------------------------------------------------------------------------
# ids int64 [...], weight [G, V, D] with V a power of two -> [..., D], dtype of weight:
#   out = sum over g of weight[g, (ids >> g*log2(V)) & (V - 1)];  mask_embedding [D] where mask is True.
# Sums in float32, rounded once. Gradients of weight and mask_embedding are deterministic and do not depend
# on the number of threads: each element is a sum over positions in order. The id of a masked
# position is not looked at. An id outside [0, V**G) has no row: its result is NaN and adds to no gradient,
# and a ValueError names it where that can be known without waiting for a device.

MAX_GROUPS = 8


# --- reference --------------------------------------------------------------------------------
def reference(
    ids: Tensor, weight: Tensor, mask: Tensor | None, mask_embedding: Tensor | None
) -> Tensor:
    """Plain torch, any floating dtype, differentiable."""
    groups, bits = weight.shape[0], _bits(weight)
    last = (1 << bits) - 1
    out = F.embedding(ids & last, weight[0])
    for g in range(1, groups):
        out = out + F.embedding((ids >> (g * bits)) & last, weight[g])
    out = out.masked_fill(((ids >> (groups * bits)) != 0).unsqueeze(-1), torch.nan)
    if mask is not None and mask_embedding is not None:
        out = torch.where(mask.unsqueeze(-1), mask_embedding, out)
    return out


def _bits(weight: Tensor) -> int:
    return int(weight.shape[1]).bit_length() - 1


def _complain(ids: Tensor, limit_bits: int, position: int) -> None:
    index = _checks.unravel(position, ids.shape)
    raise ValueError(
        f"ids: expected values in [0, {2**limit_bits}), got {int(ids[index])} at {index}"
    )


# --- schema and fake --------------------------------------------------------------------------
_native.LIB.define(
    "factorized_embedding(Tensor ids, Tensor weight, Tensor? mask, Tensor? mask_embedding) -> Tensor"
)
_native.LIB.define(
    "factorized_embedding_backward(Tensor ids, Tensor? mask, Tensor grad, int groups, int bits)"
    " -> (Tensor, Tensor)"
)


def _fake(
    ids: Tensor, weight: Tensor, mask: Tensor | None, mask_embedding: Tensor | None
) -> Tensor:
    return weight.new_empty([*ids.shape, weight.shape[2]])


torch.library.register_fake("magvit_fast::factorized_embedding", _fake, lib=_native.LIB)


def _fake_backward(
    ids: Tensor, mask: Tensor | None, grad: Tensor, groups: int, bits: int
) -> tuple[Tensor, Tensor]:
    dim = grad.shape[-1]
    return grad.new_empty([groups, 1 << bits, dim]), grad.new_empty(
        [dim if mask is not None else 0]
    )


torch.library.register_fake(
    "magvit_fast::factorized_embedding_backward", _fake_backward, lib=_native.LIB
)


# --- launch -----------------------------------------------------------------------------------
def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _launch(
    ids: Tensor, weight: Tensor, mask: Tensor | None, mask_embedding: Tensor | None
) -> Tensor:
    groups, bits, dim = weight.shape[0], _bits(weight), weight.shape[2]
    ids, weight = ids.contiguous(), weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    mask_embedding = None if mask_embedding is None else mask_embedding.contiguous()
    out = _native.in_huge_pages(weight.new_empty([*ids.shape, dim]))
    bad = _checks.no_bad_position(ids.device)
    _native.trace("factorized_embedding", ids=tuple(ids.shape), weight=tuple(weight.shape),
                  dtype=weight.dtype, device=ids.device)  # fmt: skip
    core, where, how = _native.launcher(ids.device)
    core.factorized_embedding_forward(
        ids.data_ptr(), _address(mask), ids.numel(), dim, groups, bits,
        _native.dtype_code(weight.dtype), weight.data_ptr(), _address(mask_embedding),
        out.data_ptr(), bad.data_ptr(), where, how,
    )  # fmt: skip
    _native.finish(ids.device)
    position = _checks.first_bad_position(bad)
    if position is not None:
        _complain(ids, groups * bits, position)
    return out


def _launch_backward(
    ids: Tensor, mask: Tensor | None, grad: Tensor, groups: int, bits: int
) -> tuple[Tensor, Tensor]:
    ids, grad = ids.contiguous(), grad.contiguous()
    mask = None if mask is None else mask.contiguous()
    dim, code = grad.shape[-1], _native.dtype_code(grad.dtype)
    grad_weight = _native.in_huge_pages(grad.new_empty([groups, 1 << bits, dim]))
    grad_mask_embedding = grad.new_empty([dim if mask is not None else 0])
    _native.trace("factorized_embedding_backward", ids=tuple(ids.shape), dtype=grad.dtype,
                  device=ids.device)  # fmt: skip
    core, where, how = _native.launcher(ids.device)
    size = core.factorized_embedding_workspace_bytes(
        ids.numel(), dim, groups, bits, code, where, how
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=ids.device)
    core.factorized_embedding_backward(
        ids.data_ptr(), _address(mask), ids.numel(), dim, groups, bits, code, grad.data_ptr(),
        grad_weight.data_ptr(), 0 if mask is None else grad_mask_embedding.data_ptr(),
        workspace.data_ptr(), where, how,
    )  # fmt: skip
    _native.finish(ids.device)
    return grad_weight, grad_mask_embedding


for _device in ("CPU", "CUDA"):
    _native.LIB.impl("factorized_embedding", _launch, _device)
    _native.LIB.impl("factorized_embedding_backward", _launch_backward, _device)
_OP = torch.ops.magvit_fast.factorized_embedding.default
_BACKWARD = torch.ops.magvit_fast.factorized_embedding_backward.default


# --- autograd ---------------------------------------------------------------------------------
class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, mask: Tensor | None, mask_embedding: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(ids, mask)
        ctx.groups, ctx.bits = weight.shape[0], _bits(weight)
        return _OP(ids, weight, mask, mask_embedding)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, mask = ctx.saved_tensors
        grad_weight, grad_mask = _BACKWARD(ids, mask, grad, ctx.groups, ctx.bits)
        return None, grad_weight, None, None if mask is None else grad_mask


# --- public -----------------------------------------------------------------------------------
def _check(ids: Tensor, weight: Tensor, mask: Tensor | None, mask_embedding: Tensor | None) -> None:
    _checks.check_tensor("ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected dtype torch.int64, got {ids.dtype}")
    _checks.check_tensor("weight", weight, ndim=3, floating=True)
    _checks.check_same("weight", weight, "ids", ids, dtype=False)
    groups, values, dim = weight.shape
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"weight: expected 1 to {MAX_GROUPS} sub-tables, got {groups}")
    if values < 1 or values & (values - 1) or groups * _bits(weight) > 62:
        raise ValueError(
            "weight: expected a power of two of rows a sub-table and at most 62 bits an id, "
            f"got shape {tuple(weight.shape)}"
        )
    if (mask is None) != (mask_embedding is None):
        raise ValueError("mask: expected together with mask_embedding, got one without the other")
    if mask is None or mask_embedding is None:
        return
    _checks.check_tensor("mask", mask)
    _checks.check_same("mask", mask, "ids", ids, dtype=False)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"mask: expected shape {tuple(ids.shape)} (that of ids), got {tuple(mask.shape)}"
        )
    _checks.check_tensor("mask_embedding", mask_embedding, ndim=1, floating=True)
    _checks.check_same("mask_embedding", mask_embedding, "weight", weight)
    if mask_embedding.shape[0] != dim:
        raise ValueError(
            f"mask_embedding: expected shape ({dim},), got {tuple(mask_embedding.shape)}"
        )


def factorized_embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Embed packed tokens: the sum of one row of each sub-table, or the mask's own vector.

    Args:
        ids: int64 [...], sub-token g = (ids >> g*log2(V)) & (V - 1); any strides.
        weight: [G, V, D], G <= 8 sub-tables of V rows, V a power of two.
        mask: bool, shape of ids: True where the token is [MASK]; its id is not looked at.
        mask_embedding: [D], dtype of weight; given together with mask.
        impl: "auto", "native" or "reference".

    Returns:
        [..., D], dtype of weight, contiguous. Differentiable in weight and mask_embedding, once;
        deterministic. On CUDA an id out of range gives a row of NaN (and a ValueError only with
        MAGVIT_FAST_SYNC=1).

    Raises:
        ValueError: shapes that do not fit; an unmasked id outside [0, V**G), the first is named (CPU).
        TypeError: ids are not int64, mask is not bool, weight is not floating.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737) section 3.1, token factorization; the sum over sub-tables is our choice,
    the paper does not say how sub-tokens are combined.
    """
    _check(ids, weight, mask, mask_embedding)
    obstacle = _native.native_dtype_obstacle(weight.dtype) or _native.missing_core(ids.device)
    if _native.use_native("factorized_embedding", impl, obstacle):
        return _Embedding.apply(ids, weight, mask, mask_embedding)  # type: ignore[no-untyped-call, no-any-return]
    if not torch.compiler.is_compiling() and ids.device.type == "cpu":
        bad = (ids >> (weight.shape[0] * _bits(weight))) != 0
        positions = (bad if mask is None else bad & ~mask).flatten().nonzero()
        if positions.numel():
            _complain(ids, weight.shape[0] * _bits(weight), int(positions[0]))
    return reference(ids, weight, mask, mask_embedding)
