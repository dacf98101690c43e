"""LFQ with the constructor, defaults, returns and state_dict of vector-quantize-pytorch 1.32.0.

    from magvit_fast.compat.vector_quantize_pytorch import LFQ

The numbers are theirs as well, with their logarithm clamped at 1e-5, but found without the N x 2**D
softmax: bits factorize (ops.lfq_entropy), and what the clamp changes in the sample entropy comes from
two sorted tables of half codes. Ids are most significant bit first (channel 0 is the highest bit).

Two faults of theirs are not copied unless `peer_faults=True` asks for them (`patch` does, because it
never changes results):
    - with a mask the mean over positions is left out, so that the codebook entropy is the sample
      entropy and the two cancel;
    - across processes the all-reduced mean distribution is dropped and the process's own divided by
      the number of processes. Here it is averaged over them, with its gradient.
`codebook` is made when it is read, not kept: it would be 2**D x D floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.ops._sync import is_distributed
from magvit_fast.ops.lfq_entropy import MAX_CHANNELS

LOG_CLAMP = 1e-5


class Return(NamedTuple):
    """quantized in the input's shape; indices int64; the weighted auxiliary loss, a scalar."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """Scalars before their weights, entropies in nats."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Cosine similarity of x [..., dim_in] to the columns of a [dim_in, dim_out] weight, times scale."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0)) * self.scale


# --- the clamp's share of the sample entropy ----------------------------------------------------
def _sorted_half(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the codes of some bits, ascending, with the running sums of p and p log p from below."""
    log_plus, log_minus = F.logsigmoid(logits), F.logsigmoid(-logits)  # [N, d]
    table = torch.zeros(logits.shape[0], 1, dtype=logits.dtype, device=logits.device)
    for bit in range(logits.shape[1]):
        plus, minus = log_plus[:, bit : bit + 1], log_minus[:, bit : bit + 1]
        table = torch.cat([table + minus, table + plus], dim=1)
    table = table.sort(dim=1).values
    p = table.exp()
    return table, F.pad(p.cumsum(1), (1, 0)), F.pad((p * table).cumsum(1), (1, 0))


def clamped_excess(logits: Tensor, eps: float = LOG_CLAMP) -> Tensor:
    """sum over codes with p < eps of p (log p - log eps), per position [N]: what must be ADDED to the
    exact entropy to get -sum p log max(p, eps).

    logits [N, D]: log-odds of the bits. A code's log p is a sum over two halves of the bits; for each
    code of the one half the codes of the other that keep p below eps are a prefix of its sorted
    table, so that D = 18 costs N x 512 look-ups instead of N x 262,144 logarithms. Differentiable (the
    summand is zero at the border, so that the border's own movement does not count).
    """
    low = logits.shape[1] // 2
    high_log, _, _ = _sorted_half(logits[:, low:])
    low_log, low_p, low_plogp = _sorted_half(logits[:, :low])
    border = math.log(eps) - high_log
    count = torch.searchsorted(low_log.detach().contiguous(), border.detach().contiguous())
    mass, entropy = low_p.gather(1, count), low_plogp.gather(1, count)
    return (high_log.exp() * ((high_log - math.log(eps)) * mass + entropy)).sum(1)


def entropies(
    z: Tensor, inv_temperature: float, *, divided_by: int | None = None
) -> tuple[Tensor, Tensor]:
    """(sample entropy, codebook entropy) of z [N, D] with logarithms clamped at LOG_CLAMP, in nats.

    divided_by: None averages the mean distribution P over the processes; a number n gives -sum of
    P/n log max(P/n, clamp) of this process instead, which is (entropy clamped at n eps + log n) / n.
    """
    n = divided_by or 1
    sample, codebook = ops.lfq_entropy(
        z,
        inv_temperature=inv_temperature,
        eps=n * LOG_CLAMP,
        log_guard="clamp",
        sync=divided_by is None,
    )
    logits = (4.0 * inv_temperature * z.float()).clamp(-1e4, 1e4)
    # A position whose likeliest code has all but 1e-7 of the mass has no share worth a table.
    undecided = logits[F.logsigmoid(logits.detach().abs()).sum(1) < -1e-7]
    if undecided.shape[0]:
        sample = sample + clamped_excess(undecided, LOG_CLAMP).sum() / z.shape[0]
    return sample, (codebook + math.log(n)) / n


# --- the module ---------------------------------------------------------------------------------
class NativeLFQ:
    """Mixin over an LFQ of either package: forward on our ops, from the attributes they share."""

    peer_faults = True

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """x [B, N, dim], or [B, dim, ...] for four axes and more (`channel_first` decides otherwise).

        Returns Return(quantized, indices, entropy_aux_loss), with return_loss_breakdown the pair of
        it and LossBreakdown. mask bool [B, N]: positions that count for the losses. In evaluation
        the losses are zeros of shape ().
        """
        own: Any = self
        own_returns = _returns_of(own)
        first = own.channel_first if own.channel_first is not None else x.dim() >= 4
        if first:
            x = x.movedim(1, -1)
            inner = x.shape[1:-1]
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        if x.shape[-1] != own.dim:
            raise ValueError(f"x: expected {own.dim} features, got {x.shape[-1]}")
        x = own.project_in(x)
        if own.soft_clamp_input_value is not None:
            x = (x / own.soft_clamp_input_value).tanh() * own.soft_clamp_input_value
        x = x.unflatten(-1, (own.num_codebooks, own.codebook_dim))  # [B, N, C, D]
        if own.orthogonal_rotation:
            x = x @ own.orthogonal_rot
        x = own.maybe_l2norm(x)
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=not own.force_quantization_f32):
            x = x.float() if own.force_quantization_f32 else x
            z = x
            signs, indices = ops.lfq_quantize(z.detach(), channel_dim=-1, bit_order="msb")
            quantized = own.maybe_l2norm(signs * own.codebook_scale)
            if own.training:
                x = own.activation(x)
                x = x + (quantized - x).detach()
            else:
                x = quantized
            losses = _losses(own, z, quantized, mask, inv_temperature)
            x = x.to(dtype) if own.force_quantization_f32 else x
        if own.orthogonal_rotation:
            x = x @ own.orthogonal_rot.t()
        x = own.project_out(x.flatten(-2))
        if first:
            x = x.unflatten(1, inner).movedim(-1, 1)
            indices = indices.unflatten(1, inner)
        if not own.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        sample, codebook, commitment = losses
        entropy = sample - own.diversity_gamma * codebook if own.training else own.zero
        if own.training and own.experimental_softplus_entropy_loss:
            entropy = F.softplus(entropy + own.entropy_loss_offset)
        loss = entropy * own.entropy_loss_weight + commitment * own.commitment_loss_weight
        result = own_returns[0](x, indices, loss)
        if not return_loss_breakdown:
            return result
        return result, own_returns[1](sample, codebook, commitment)


def _returns_of(module: Any) -> tuple[Any, Any]:
    """The named tuples of the package that the module came from."""
    import sys

    for cls in type(module).__mro__:
        package = sys.modules.get(cls.__module__)
        if cls.__name__ == "LFQ" and hasattr(package, "LossBreakdown"):
            return package.Return, package.LossBreakdown  # type: ignore[union-attr]
    return Return, LossBreakdown


def _losses(
    own: Any, z: Tensor, quantized: Tensor, mask: Tensor | None, inv_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sample entropy, codebook entropy, commitment) of z [B, N, C, D]."""
    if not own.training:
        return own.zero, own.zero, own.zero
    counted = z.flatten(0, 1) if mask is None else z[mask]  # [M, C, D]
    if own.frac_per_sample_entropy < 1.0:
        total = counted.shape[0]
        # their draw, from the CPU's generator, so that seeds mean the same
        keep = torch.randn(total).argsort(dim=-1) < int(total * own.frac_per_sample_entropy)
        counted = counted[keep.to(counted.device)]
    code = own.codebook_scale
    if own.spherical:  # a code is a corner of the cube, scaled to length codebook_scale
        code = own.codebook_scale / math.sqrt(own.codebook_dim)
    faults = own.peer_faults
    processes = (dist.get_world_size() if is_distributed() else 1) if faults else None
    pairs = [
        entropies(counted[:, c], inv_temperature * code, divided_by=processes)
        for c in range(own.num_codebooks)
    ]
    sample = torch.stack([s for s, _ in pairs]).mean()
    codebook = torch.stack([c for _, c in pairs]).mean()
    if faults and mask is not None:
        codebook = sample
    commitment = own.zero
    if own.commitment_loss_weight > 0.0:
        error = F.mse_loss(z, quantized.detach(), reduction="none")
        commitment = (error if mask is None else error[mask]).mean()
    return sample, codebook, commitment


def obstacle(module: Any) -> str | None:
    """Why this LFQ of vector-quantize-pytorch is left alone, None where it is served."""
    if not hasattr(module, "maybe_l2norm") or not hasattr(module, "soft_clamp_input_value"):
        return "an LFQ of another release of vector-quantize-pytorch"
    if module.codebook_dim > MAX_CHANNELS:
        return f"{module.codebook_dim} bits; the entropy serves up to {MAX_CHANNELS}"
    return None


class LFQ(NativeLFQ, nn.Module):
    """Lookup-free quantizer; arguments, defaults and state_dict as in vector-quantize-pytorch.

    Persistent state: `mask` [D] (powers of two, most significant first), `project_in`, `project_out`
    where dim differs from the bits, `orthogonal_rot`. Additional argument:

        peer_faults: reproduce the two faults that the module's docstring names.

    Raises:
        ValueError: neither dim nor codebook_size, a codebook_size that is no power of two, an
            inconsistent keep_num_codebooks_dim, a fraction or clamp out of range.
    """

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: Callable[[Tensor], Tensor] | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
        peer_faults: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size, bits = _bits(dim, codebook_size)
        width = bits * num_codebooks
        self.dim = width if dim is None else dim
        self.codebook_dim, self.num_codebooks = bits, num_codebooks
        self.has_projections = self.dim != width if has_projections is None else has_projections
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                scale = cosine_sim_project_in_scale
                scale = codebook_scale if scale is None else scale
                self.project_in = CosineSimLinear(self.dim, width, scale)
            else:
                self.project_in = nn.Linear(self.dim, width, bias=projection_has_bias)
            self.project_out = nn.Linear(width, self.dim, bias=projection_has_bias)
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if num_codebooks > 1 and not keep:
            raise ValueError("keep_num_codebooks_dim: must be kept with more than one codebook")
        self.keep_num_codebooks_dim = keep
        self.channel_first = channel_first
        self.activation = straight_through_activation or nn.Identity()
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            rotation = nn.init.orthogonal_(torch.empty(bits, bits))
            self.register_buffer("orthogonal_rot", rotation)
        if not 0 < frac_per_sample_entropy <= 1:
            raise ValueError(
                f"frac_per_sample_entropy: expected (0, 1], got {frac_per_sample_entropy}"
            )
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value: expected at least codebook_scale ({codebook_scale}), "
                f"got {soft_clamp_input_value}"
            )
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self.peer_faults = peer_faults
        self.mask: Tensor
        self.zero: Tensor
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def maybe_l2norm(self, t: Tensor) -> Tensor:
        """For spherical codes: t scaled to length codebook_scale along its last axis."""
        return F.normalize(t, dim=-1) * self.codebook_scale if self.spherical else t

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Bits 0 / 1 to -codebook_scale / +codebook_scale."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    @property
    def codebook(self) -> Tensor:
        """All codes, [2**D, D], made anew at each reading."""
        codes = torch.arange(self.codebook_size, device=self.mask.device)
        return self.bits_to_codes(((codes[:, None] & self.mask) != 0).to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.zero.dtype

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Ids [B, N] or [B, ...] (with a last axis of codebooks if those are kept) to features."""
        if not self.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        first = indices.dim() >= 4 if self.channel_first is None else self.channel_first
        bits = ((indices.unsqueeze(-1) & self.mask) != 0).to(self.dtype)
        codes = self.maybe_l2norm(self.bits_to_codes(bits))
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.t()  # type: ignore[operator]
        codes = codes.flatten(-2)
        codes = self.project_out(codes) if project_out else codes
        return codes.movedim(-1, 1) if first else codes


def _bits(dim: int | None, codebook_size: int | None) -> tuple[int, int]:
    """(codes, bits) from what the caller gave."""
    if dim is None and codebook_size is None:
        raise ValueError("dim, codebook_size: expected at least one of them, got neither")
    if codebook_size is None:
        assert dim is not None
        codebook_size = 2**dim
    bits = codebook_size.bit_length() - 1
    if codebook_size != 1 << bits or bits < 1:
        raise ValueError(f"codebook_size: expected a power of two, at least 2, got {codebook_size}")
    return codebook_size, bits
