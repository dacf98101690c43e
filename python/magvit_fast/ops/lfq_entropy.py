"""lfq_entropy: the sample and codebook entropies of look-up-free quantization, exact over 2**D codes.

Next hop: `_core.lfq_entropy_sums`, `_codebook`, `_backward` (csrc/lfq_entropy).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast import _native
from magvit_fast.ops import _checks, _precision
from magvit_fast.ops._layout import block_of, walked_alike, without_axis
from magvit_fast.ops._sync import all_reduced, is_distributed, sum_over_processes

# --- contract ---------------------------------------------------------------------------------
# z [..., D at channel_dim, ...], N counted positions (mask True; all without a mask).
# A code is D bits; the softmax over codes c of 2 * inv_temperature * <z, c> factorizes into
#   p(bit d of position n = +) = sigmoid(4 * inv_temperature * z[n, d]).
#   per_sample = mean over n of the entropy of n's codes = mean over n of the sum over d of h(p[n, d])
#   codebook   = -sum over the 2**D codes k of P_k log guard(P_k),  P_k = mean over n of p(k | n)
# guard: the identity for eps = 0 (0 log 0 = 0); P + eps ("shift"); max(P, eps) ("clamp").
# Both in nats, float32 scalars (float64 for float64 z); 0 where nothing is counted. The probabilities and sums
# are float32 whatever z's dtype and autocast. NaN in z gives NaN.
# Memory O(N * D + 2**D): the tables of half codes exist for a block of positions at a time.
#
# sync=True with torch.distributed initialized: N, the sums and P run over all processes (positions
# weighted equally, whatever a process's share), so that every process returns the values that one process
# would with all positions. Gradients: backward adds up what arrives over processes, as for an objective
# that is the SUM of the processes' losses; a loss that all of them compute alike so gives world_size
# times its gradient on each process's z, and the averaging of parameter gradients that DDP and FSDP do
# makes that exactly the gradient of one process with the global batch. Every process must call the op, and
# call backward, in the same order.

MAX_CHANNELS = 24
GUARDS = ("shift", "clamp")
_TINY = 1e-37  # stands in for P = 0 inside the logarithm: 0 log 0 = 0, and no infinite slope


# --- reference --------------------------------------------------------------------------------
def _half_table(log_plus: Tensor, log_minus: Tensor) -> Tensor:
    """[N, d] log-probabilities of bits -> [N, 2**d] probabilities of codes, bit 0 least significant."""
    table = torch.zeros(log_plus.shape[0], 1, dtype=log_plus.dtype, device=log_plus.device)
    for d in range(log_plus.shape[1]):
        table = torch.cat([table + log_minus[:, d : d + 1], table + log_plus[:, d : d + 1]], dim=1)
    return table.exp()


def reference(
    z: Tensor,
    axis: int,
    inv_temperature: float,
    eps: float,
    log_guard: str,
    mask: Tensor | None,
    sync: bool,
) -> tuple[Tensor, Tensor]:
    """Plain torch, differentiable; float64 stays float64, everything else is computed in float32."""
    x = z.movedim(axis, -1).reshape(-1, z.shape[axis])  # [N, D]
    x = 4.0 * inv_temperature * (x if x.dtype == torch.float64 else x.float())
    counted = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
    if mask is not None:
        counted = mask.reshape(-1).to(x.dtype)
        x = torch.where(counted.unsqueeze(1) > 0, x, 0.0)
    x = x.clamp(-1e4, 1e4)  # infinity times zero is NaN; far beyond where a probability is 0 or 1
    log_plus, log_minus = F.logsigmoid(x), F.logsigmoid(-x)  # [N, D]
    low = x.shape[1] // 2
    high_table = _half_table(log_plus[:, low:], log_minus[:, low:])  # [N, 2**(D - low)]
    low_table = _half_table(log_plus[:, :low], log_minus[:, :low]) * counted.unsqueeze(1)
    probs = high_table.T @ low_table  # [2**(D - low), 2**low], summed over positions
    sample = (-(log_plus.exp() * log_plus + log_minus.exp() * log_minus).sum(1) * counted).sum()
    count = counted.sum()
    if sync:
        probs, sample = sum_over_processes(probs), sum_over_processes(sample)
        count = sum_over_processes(count)
    count = count.clamp(min=1)
    mean = probs / count
    shift = eps > 0 and log_guard == "shift"
    guarded = mean + eps if shift else mean.clamp(min=max(eps, _TINY))
    return sample / count, -(mean * guarded.log()).sum()


# --- schema and fake --------------------------------------------------------------------------
# probs [2**D] and stats [2] = (sum of sample entropies, count), float64, are sums over positions, so
# that processes can add theirs up before the entropy is taken.
_native.LIB.define(
    "lfq_entropy_sums(Tensor z, Tensor? mask, int channel_dim, float scale) -> (Tensor, Tensor)"
)
_native.LIB.define(
    "lfq_entropy_codebook(Tensor probs, Tensor stats, float eps, bool clamp) -> (Tensor, Tensor)"
)
_native.LIB.define(
    "lfq_entropy_backward(Tensor z, Tensor? mask, int channel_dim, float scale, Tensor probs,"
    " Tensor stats, Tensor grad_sample, Tensor grad_codebook, float eps, bool clamp) -> Tensor"
)


def _fake_sums(
    z: Tensor, mask: Tensor | None, channel_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    stats = z.new_empty([2], dtype=torch.float64)
    return z.new_empty([1 << z.shape[channel_dim]], dtype=torch.float32), stats


torch.library.register_fake("magvit_fast::lfq_entropy_sums", _fake_sums, lib=_native.LIB)


def _fake_codebook(probs: Tensor, stats: Tensor, eps: float, clamp: bool) -> tuple[Tensor, Tensor]:
    return probs.new_empty([]), probs.new_empty([])


torch.library.register_fake("magvit_fast::lfq_entropy_codebook", _fake_codebook, lib=_native.LIB)


def _fake_backward(z: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(z)


torch.library.register_fake("magvit_fast::lfq_entropy_backward", _fake_backward, lib=_native.LIB)


# --- launch -----------------------------------------------------------------------------------
def _workspace(device: torch.device, positions: int, channels: int) -> Tensor:
    core, where, how = _native.launcher(device)
    size = core.lfq_entropy_workspace_bytes(positions, channels, where, how)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _arrange(z: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor | None]:
    """z as one block in memory and mask contiguous."""
    if block_of(z, axis) is None:
        z = z.contiguous()
    return z, None if mask is None else mask.contiguous()


def _launch_sums(
    z: Tensor, mask: Tensor | None, channel_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    z, mask = _arrange(z, mask, channel_dim)
    block = block_of(z, channel_dim)
    assert block is not None
    probs = torch.empty(1 << block.channels, dtype=torch.float32, device=z.device)
    stats = torch.empty(2, dtype=torch.float64, device=z.device)
    workspace = _workspace(z.device, block.outer * block.inner, block.channels)
    _native.trace("lfq_entropy_sums", shape=tuple(z.shape), dtype=z.dtype, device=z.device)
    core, where, how = _native.launcher(z.device)
    core.lfq_entropy_sums(
        z.data_ptr(), 0 if mask is None else mask.data_ptr(), *block, _native.dtype_code(z.dtype),
        scale, stats.data_ptr(), probs.data_ptr(), workspace.data_ptr(),
        _precision.full_matmul_on_cuda(), where, how,
    )  # fmt: skip
    _native.finish(z.device)
    return probs, stats


def _launch_codebook(
    probs: Tensor, stats: Tensor, eps: float, clamp: bool
) -> tuple[Tensor, Tensor]:
    """The mean sample entropy and the codebook entropy."""
    probs, stats = probs.contiguous(), stats.contiguous()
    channels = probs.numel().bit_length() - 1
    per_sample, entropy = (
        torch.empty([], dtype=torch.float32, device=probs.device) for _ in range(2)
    )
    workspace = _workspace(probs.device, 0, channels)
    core, where, how = _native.launcher(probs.device)
    core.lfq_entropy_codebook(
        probs.data_ptr(), stats.data_ptr(), per_sample.data_ptr(), entropy.data_ptr(),
        workspace.data_ptr(), probs.numel(), eps, clamp, where, how,
    )  # fmt: skip
    _native.finish(probs.device)
    return per_sample, entropy


def _launch_backward(
    z: Tensor, mask: Tensor | None, channel_dim: int, scale: float, probs: Tensor, stats: Tensor,
    grad_sample: Tensor, grad_codebook: Tensor, eps: float, clamp: bool,
) -> Tensor:  # fmt: skip
    grad_z = torch.empty_like(z)
    source, written, block = walked_alike(z, grad_z, channel_dim)
    probs, stats = probs.contiguous(), stats.contiguous()
    mask = None if mask is None else mask.contiguous()
    # Named, so that the memory outlives the call.
    of_sample, of_codebook = grad_sample.float().contiguous(), grad_codebook.float().contiguous()
    workspace = _workspace(z.device, block.outer * block.inner, block.channels)
    _native.trace("lfq_entropy_backward", shape=tuple(z.shape), dtype=z.dtype, device=z.device)
    core, where, how = _native.launcher(z.device)
    core.lfq_entropy_backward(
        source.data_ptr(), 0 if mask is None else mask.data_ptr(), *block,
        _native.dtype_code(z.dtype), scale, probs.data_ptr(), stats.data_ptr(),
        of_sample.data_ptr(), of_codebook.data_ptr(), written.data_ptr(), workspace.data_ptr(),
        eps, clamp, _precision.full_matmul_on_cuda(), where, how,
    )  # fmt: skip
    _native.finish(z.device)
    return grad_z if written is grad_z else grad_z.copy_(written)


for _device in ("CPU", "CUDA"):
    _native.LIB.impl("lfq_entropy_sums", _launch_sums, _device)
    _native.LIB.impl("lfq_entropy_codebook", _launch_codebook, _device)
    _native.LIB.impl("lfq_entropy_backward", _launch_backward, _device)
_SUMS = torch.ops.magvit_fast.lfq_entropy_sums.default
_CODEBOOK = torch.ops.magvit_fast.lfq_entropy_codebook.default
_BACKWARD = torch.ops.magvit_fast.lfq_entropy_backward.default


# --- autograd ---------------------------------------------------------------------------------
class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mask: Tensor | None,
        axis: int,
        scale: float,
        eps: float,
        clamp: bool,
        sync: bool,
    ) -> tuple[Tensor, Tensor]:
        probs, stats = _SUMS(z, mask, axis, scale)
        if sync:
            probs, stats = all_reduced(probs), all_reduced(stats)
        ctx.save_for_backward(z, mask, probs, stats)
        ctx.numbers = (axis, scale, eps, clamp, sync)
        entropies: tuple[Tensor, Tensor] = _CODEBOOK(probs, stats, eps, clamp)
        return entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_sample, grad_codebook = grads
        axis, scale, eps, clamp, sync = ctx.numbers
        z, mask, probs, stats = ctx.saved_tensors
        if sync:
            grad_sample, grad_codebook = all_reduced(torch.stack(grads)).unbind()
        grad_z = _BACKWARD(
            z, mask, axis, scale, probs, stats, grad_sample, grad_codebook, eps, clamp
        )
        return grad_z, None, None, None, None, None, None


# --- public -----------------------------------------------------------------------------------
def _check(
    z: Tensor, axis: int, inv_temperature: float, eps: float, log_guard: str, mask: Tensor | None
) -> None:
    if not 1 <= z.shape[axis] <= MAX_CHANNELS:
        raise ValueError(
            f"z: expected 1 to {MAX_CHANNELS} channels at dim {axis}, got {z.shape[axis]} "
            "(more bits: take the entropy by groups of channels)"
        )
    _checks.check_number("eps", eps)
    if _checks.check_number("inv_temperature", inv_temperature) <= 0:
        raise ValueError(f"inv_temperature: expected a positive number, got {inv_temperature}")
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected 0 <= eps < 1, got {eps}")
    _checks.check_choice("log_guard", log_guard, GUARDS)
    if mask is None:
        return
    _checks.check_tensor("mask", mask)
    _checks.check_same("mask", mask, "z", z, dtype=False)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    expected = tuple(without_axis(z, axis))
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask: expected shape {expected} (that of z without its channels), "
            f"got {tuple(mask.shape)}"
        )


def lfq_entropy(
    z: Tensor,
    *,
    channel_dim: int = 1,
    inv_temperature: float = 100.0,
    eps: float = 0.0,
    log_guard: str = "shift",
    mask: Tensor | None = None,
    sync: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample and codebook entropy of look-up-free quantization, exactly, over all 2**D codes.

    The bits of a code are independent given z, so the sum over positions of all code probabilities is one
    product of two [N, 2**(D/2)] tables: O(2**D) memory where the plain softmax needs O(N * 2**D).
    The product has float32's precision; on CUDA devices that of TF32, which is two to three times as fast
    there, where torch is allowed it (torch.set_float32_matmul_precision("high")).

    Args:
        z: [..., D, ...] before the sign, D <= 24 bits at `channel_dim`; any floating dtype, any strides.
        inv_temperature: of the softmax over codes with logits 2 * inv_temperature * <z, c>, c in
            {-1, +1}**D (1 / 0.01 in MAGVIT-v2's port and in vector-quantize-pytorch).
        eps: 0 for the exact entropy. Others guard the logarithm of the mean distribution, which at 2**18 codes
            (uniform: 3.8e-6) changes the codebook entropy by a nat; 1e-5 reproduces them.
        log_guard: for eps > 0, "shift": log(P + eps) (Google's port, Open-MAGVIT2), "clamp":
            log(max(P, eps)) (vector-quantize-pytorch).
        mask: bool, the shape of z without its channel axis; only True positions are counted.
        sync: average over all processes of torch.distributed, where it is initialized. Values and
            gradients are those of one process with all positions, when gradients are averaged over
            processes as DDP does (on its own, z's gradient is world_size times that).
        impl: "auto", "native" or "reference".

    Returns:
        per_sample: mean over positions of the entropy of the position's code (nats): to be made small.
        codebook: entropy of the mean distribution over codes (nats): to be made large.
        Both are float32 scalars (float64 for float64), differentiable once; 0 if nothing is counted.

    Raises:
        ValueError: more than 24 channels, numbers out of range, a mask of another shape.
        TypeError: z is not floating, mask is not bool.
        NotImplementedError: impl="native" where no kernel serves the dtype or device.

    Source: MAGVIT-v2 (arXiv 2310.05737) section 3.1 and equation 5.
    """
    _checks.check_tensor("z", z, floating=True)
    axis = _checks.channel_axis(z, channel_dim)
    _check(z, axis, inv_temperature, eps, log_guard, mask)
    obstacle = _native.native_dtype_obstacle(z.dtype) or _native.missing_core(z.device)
    if _native.use_native("lfq_entropy", impl, obstacle):
        scale = 4.0 * inv_temperature
        together = sync and is_distributed()
        return _Entropy.apply(z, mask, axis, scale, eps, log_guard == "clamp", together)  # type: ignore[no-untyped-call, no-any-return]
    with _checks.without_autocast(z):  # the matrix product
        return reference(z, axis, inv_temperature, eps, log_guard, mask, sync)
