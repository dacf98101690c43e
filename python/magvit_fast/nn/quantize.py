"""Lookup-free quantization (LFQ): the sign of each channel is one bit of the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.nn.embedding import pack_subtokens, unpack_subtokens
from magvit_fast.ops._checks import values_can_be_read

EntropyKind = Literal["softmax", "argmax"]


@dataclass
class LFQOutput:
    """What LFQ returns.

    Attributes:
        quantized: -1 / +1 in z's shape, with the straight-through gradient.
        ids: int64 [B, T', H', W'], channel 0 the least significant bit.
        losses: scalars. "commitment" and "entropy" carry their weights, "quantizer" is their sum;
            "sample_entropy" and "codebook_entropy" are plain nats. Empty if none were asked for.
    """

    quantized: Tensor
    ids: Tensor
    losses: dict[str, Tensor]


class LFQ(nn.Module):
    """Lookup-free quantizer of MAGVIT-v2 (section 3.1), with the options of Google's port.

    z > 0 gives bit 1 (+1), z <= 0 gives bit 0 (-1): the paper's rule. Google's port sends +0.0 and
    -0.0 to +1 instead; the two differ at exact zeros only.

        commitment = commitment_weight * mean((z - sg(q))**2)
        entropy    = entropy_weight * (sample_entropy - entropy_balance * codebook_entropy)

    where bit i is a Bernoulli with p(+) = sigmoid(4 z_i / temperature); sample_entropy is the mean
    over positions of the sum over bits, codebook_entropy the entropy of the mean distribution over
    all 2**D codes, both in nats. No activation comes before the sign and there is no codebook loss.

    Args:
        num_bits: D, the channels of z.
        num_token_groups: into how many sub-tokens `split_ids` cuts an id (ceil(D / groups) bits
            each, the last may be shorter).
        entropy_groups: with G > 1 codebook_entropy is the MEAN over groups of D / G bits: the G
            contiguous ones and, if a group has more than one bit, the G strided ones (channels
            j, j + G, ...). sample_entropy stays the sum over all bits, so that the two no longer
            balance (as in the port).
        entropy_weight, entropy_balance, commitment_weight, temperature: see above.
        entropy_eps: 0 is the exact entropy. The port adds 1e-5 to the probability inside the
            codebook entropy's logarithm, which at 2**18 codes caps it at 11.19 nats of 12.48; pass
            1e-5 to match it.
        entropy_kind: "argmax" puts one-hot(argmax p) for p in value, with the gradient of p
            (needs entropy_eps > 0: most codes then have probability zero).
        sync: across processes the mean distribution is averaged over all of them while training
            ("softmax" only; "argmax" stays within the process).
    """

    def __init__(
        self,
        num_bits: int,
        *,
        num_token_groups: int = 1,
        entropy_groups: int = 1,
        entropy_weight: float = 0.1,
        entropy_balance: float = 1.0,
        commitment_weight: float = 0.25,
        temperature: float = 0.01,
        entropy_eps: float = 0.0,
        entropy_kind: EntropyKind = "softmax",
        sync: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= num_bits <= 62:
            raise ValueError(f"num_bits: expected 1..62, got {num_bits}")
        if not 1 <= num_token_groups <= num_bits:
            raise ValueError(f"num_token_groups: expected 1..{num_bits}, got {num_token_groups}")
        if entropy_groups < 1 or num_bits % entropy_groups:
            raise ValueError(
                f"entropy_groups: expected a divisor of num_bits ({num_bits}), got {entropy_groups}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if entropy_kind not in ("softmax", "argmax"):
            raise ValueError(f"entropy_kind: expected 'softmax' or 'argmax', got {entropy_kind!r}")
        if entropy_kind == "argmax" and entropy_eps <= 0:
            raise ValueError(
                f"entropy_eps: entropy_kind 'argmax' needs a positive value, got {entropy_eps}"
            )
        self.num_bits = num_bits
        self.num_token_groups = num_token_groups
        self.entropy_groups = entropy_groups
        self.entropy_weight = entropy_weight
        self.entropy_balance = entropy_balance
        self.commitment_weight = commitment_weight
        self.inv_temperature = 1.0 / temperature
        self.entropy_eps = entropy_eps
        self.entropy_kind: EntropyKind = entropy_kind
        self.sync = sync

    # ---- codes ----------------------------------------------------------------------------------
    @property
    def num_codes(self) -> int:
        """2**D."""
        return 1 << self.num_bits

    @property
    def group_bits(self) -> int:
        """Bits of one sub-token (the last one may have fewer)."""
        return -(-self.num_bits // self.num_token_groups)

    def codes(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T', H', W'] -> -1 / +1 float32 [B, D, T', H', W'].

        Raises:
            TypeError: ids are not int64.
            ValueError: an id is outside 0 .. 2**D - 1.
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(
                f"ids: expected an int64 Tensor, got {getattr(ids, 'dtype', type(ids))}"
            )
        if values_can_be_read(ids):
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= self.num_codes:
                raise ValueError(
                    f"ids: expected 0..{self.num_codes - 1} ({self.num_bits} bits), "
                    f"got values in {low}..{high}"
                )
        return ops.lfq_codes(ids, self.num_bits, channel_dim=1)

    def split_ids(self, ids: Tensor) -> Tensor:
        """ids [...] -> sub-tokens [..., G], the least significant bits first."""
        return unpack_subtokens(ids, self.num_token_groups, 1 << self.group_bits)

    def merge_ids(self, sub_tokens: Tensor) -> Tensor:
        """The inverse of split_ids: [..., G] -> [...]."""
        return pack_subtokens(sub_tokens, 1 << self.group_bits)

    # ---- losses ---------------------------------------------------------------------------------
    def forward(self, z: Tensor, *, with_losses: bool = True) -> LFQOutput:
        """z [B, D, T', H', W'] (any float dtype) -> LFQOutput."""
        if z.dim() < 2 or z.shape[1] != self.num_bits:
            raise ValueError(
                f"z: expected {self.num_bits} channels on axis 1, got {tuple(z.shape)}"
            )
        quantized, ids = ops.lfq_quantize(z, channel_dim=1)
        losses = self._losses(z, quantized) if with_losses else {}
        return LFQOutput(quantized, ids, losses)

    def _losses(self, z: Tensor, quantized: Tensor) -> dict[str, Tensor]:
        wide = z if z.dtype == torch.float64 else z.float()
        commitment = self.commitment_weight * F.mse_loss(wide, quantized.detach().to(wide.dtype))
        sample, codebook = self._entropies(wide)
        entropy = self.entropy_weight * (sample - self.entropy_balance * codebook)
        return {
            "commitment": commitment,
            "entropy": entropy,
            "quantizer": commitment + entropy,
            "sample_entropy": sample,
            "codebook_entropy": codebook,
        }

    def _entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.entropy_groups
        parts = list(z.chunk(groups, dim=1))
        contiguous = [self._entropy(part) for part in parts]
        sample = torch.stack([s for s, _ in contiguous]).sum()
        books = [c for _, c in contiguous]
        if groups > 1 and self.num_bits > groups:
            books += [self._entropy(z[:, j::groups])[1] for j in range(groups)]
        return sample, torch.stack(books).mean()

    def _entropy(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.entropy_kind == "argmax":
            return _argmax_entropy(z, self.inv_temperature, self.entropy_eps)
        return ops.lfq_entropy(
            z,
            channel_dim=1,
            inv_temperature=self.inv_temperature,
            eps=self.entropy_eps,
            sync=self.sync and self.training,
        )

    def extra_repr(self) -> str:
        return (
            f"num_bits={self.num_bits}, entropy_groups={self.entropy_groups}, "
            f"entropy_kind={self.entropy_kind!r}, entropy_eps={self.entropy_eps}"
        )


def _half_probabilities(log_plus: Tensor, log_minus: Tensor) -> Tensor:
    """Log-probabilities of d bits [N, d] -> probabilities of their 2**d patterns, bit 0 lowest."""
    table = log_plus.new_zeros(log_plus.shape[0], 1)
    for i in range(log_plus.shape[1]):
        table = torch.cat([table + log_minus[:, i : i + 1], table + log_plus[:, i : i + 1]], dim=1)
    return table.exp()


def _argmax_entropy(z: Tensor, inv_temperature: float, eps: float) -> tuple[Tensor, Tensor]:
    """Entropies with one-hot(argmax p) in value and the gradient of p.

    With t = onehot + p - sg(p), the sample term is the mean of -sum_k t_k ln p_k. Its value is
    -ln p(argmax); the extra gradient -sum_k ln p_k dp_k is that of the entropy of p, which
    factorizes over the bits. The codebook term needs the mean of t: the histogram of the codes plus
    (mean p - sg(mean p)).
    """
    flat = z.movedim(1, -1).reshape(-1, z.shape[1])
    a = 4.0 * inv_temperature * flat
    plus, minus = F.logsigmoid(a), F.logsigmoid(-a)
    soft = -(plus.exp() * plus + minus.exp() * minus).sum(-1).mean()
    hard = -torch.maximum(plus, minus).sum(-1).mean()
    sample = hard + soft - soft.detach()

    bits = flat.shape[1]
    low = bits // 2
    mean_p = _half_probabilities(plus[:, low:], minus[:, low:]).T @ _half_probabilities(
        plus[:, :low], minus[:, :low]
    )
    mean_p = mean_p.reshape(-1) / flat.shape[0]
    powers = 2 ** torch.arange(bits, device=z.device)
    ids = ((flat > 0) * powers).sum(-1)
    histogram = torch.zeros_like(mean_p).index_add_(
        0, ids, torch.full_like(ids, 1, dtype=mean_p.dtype) / flat.shape[0]
    )
    target = histogram + mean_p - mean_p.detach()
    return sample, -(target * (target + eps).log()).sum()
