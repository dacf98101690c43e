"""Vector quantization (VQ): the nearest row of a learned codebook is the token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.ops._checks import values_can_be_read, without_autocast

EntropyKind = Literal["softmax", "argmax"]


@dataclass
class VQOutput:
    """What VectorQuantizer returns.

    Attributes:
        quantized: rows of the codebook in z's shape, with the straight-through gradient to z.
        ids: int64, z's shape without its channels.
        losses: scalars. "commitment", "codebook" and "entropy" carry their weights, "quantizer" is
            their sum; "sample_entropy" and "codebook_entropy" are plain nats. Empty if none were
            asked for.
    """

    quantized: Tensor
    ids: Tensor
    losses: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """The quantizer of MAGVIT (appendix A.1 and the released code).

        commitment = commitment_weight * mean((sg(q) - z)**2)
        codebook   = codebook_weight * mean((q - sg(z))**2)
        entropy    = entropy_weight * (mean_i H(p_i) - H(mean_i p_i)),
        p_i        = softmax(-|z_i - codebook|**2 / temperature)

    All of it in float32, averaged over the positions of this process's batch; no moving average of
    the codebook, no reset of dead codes. The codebook starts uniform within +-sqrt(3 / num_codes):
    the released initializer takes the number of codes, not their width, for the fan-in.

    Args:
        num_codes, dim: rows and width of the codebook.
        commitment_weight, codebook_weight, entropy_weight, temperature: see above.
        entropy_kind: "argmax" puts one-hot(argmax p) for p in value, with the gradient of p.
        entropy_eps: added to the mean probability inside the logarithm (the released guard).
    """

    def __init__(
        self,
        num_codes: int = 1024,
        dim: int = 256,
        *,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.1,
        temperature: float = 0.01,
        entropy_kind: EntropyKind = "softmax",
        entropy_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_codes < 2:
            raise ValueError(f"num_codes: expected 2 or more, got {num_codes}")
        if dim < 1:
            raise ValueError(f"dim: expected 1 or more, got {dim}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if entropy_kind not in ("softmax", "argmax"):
            raise ValueError(f"entropy_kind: expected 'softmax' or 'argmax', got {entropy_kind!r}")
        if entropy_eps <= 0:  # unused codes have probability zero
            raise ValueError(f"entropy_eps: expected a positive number, got {entropy_eps}")
        self.num_codes, self.dim = num_codes, dim
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.entropy_kind: EntropyKind = entropy_kind
        self.entropy_eps = entropy_eps
        self.codebook = nn.Parameter(torch.empty(num_codes, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(3.0 / self.num_codes)
        nn.init.uniform_(self.codebook, -bound, bound)

    def codes(self, ids: Tensor) -> Tensor:
        """ids int64 [B, ...] -> rows of the codebook [B, dim, ...].

        Raises:
            TypeError: ids are not int64.
            ValueError: an id is outside 0 .. num_codes - 1.
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(
                f"ids: expected an int64 Tensor, got {getattr(ids, 'dtype', type(ids))}"
            )
        if values_can_be_read(ids):
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= self.num_codes:
                raise ValueError(
                    f"ids: expected 0..{self.num_codes - 1}, got values in {low}..{high}"
                )
        return F.embedding(ids, self.codebook).movedim(-1, 1)

    def forward(self, z: Tensor, *, with_losses: bool = True) -> VQOutput:
        """z [B, dim, ...] (any float dtype) -> VQOutput."""
        if z.dim() < 2 or z.shape[1] != self.dim:
            raise ValueError(f"z: expected {self.dim} channels on axis 1, got {tuple(z.shape)}")
        ids = ops.vq_nearest(z, self.codebook)
        rows = F.embedding(ids, self.codebook).movedim(-1, 1)
        losses = self._losses(z, rows) if with_losses else {}
        # z - sg(z) is zero: exactly the rows in value, and their gradient goes to z.
        quantized = rows.detach().to(z.dtype) + (z - z.detach())
        return VQOutput(quantized, ids, losses)

    def _losses(self, z: Tensor, rows: Tensor) -> dict[str, Tensor]:
        with without_autocast(z):
            wide = torch.promote_types(torch.promote_types(z.dtype, rows.dtype), torch.float32)
            z, rows = z.to(wide), rows.to(wide)
            commitment = self.commitment_weight * F.mse_loss(z, rows.detach())
            codebook = self.codebook_weight * F.mse_loss(rows, z.detach())
            flat = z.movedim(1, -1).reshape(-1, self.dim)
            sample, marginal = affinity_entropy(
                -squared_distances(flat, self.codebook.to(wide)),
                temperature=self.temperature,
                kind=self.entropy_kind,
                eps=self.entropy_eps,
            )
        entropy = self.entropy_weight * (sample - marginal)
        return {
            "commitment": commitment,
            "codebook": codebook,
            "entropy": entropy,
            "quantizer": commitment + codebook + entropy,
            "sample_entropy": sample,
            "codebook_entropy": marginal,
        }

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}, entropy_kind={self.entropy_kind!r}"


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """[N, D], [K, D] -> |x_i - c_k|**2 [N, K], as |x|**2 - 2 x.c + |c|**2."""
    norms = x.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return torch.addmm(norms, x, codebook.T, alpha=-2.0)


def affinity_entropy(
    affinity: Tensor,
    *,
    temperature: float = 1.0,
    kind: EntropyKind = "softmax",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(mean entropy of a position, entropy of the mean distribution) in nats.

    affinity [N, K]: p = softmax(affinity / temperature). With kind "argmax" the distribution is
    one-hot(argmax p) in value and has the gradient of p; the logarithm of the first term is that of
    p all the same. MAGVIT's released code; its 1e-5 on the logits changes nothing and is left out.
    """
    logits = affinity / temperature
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    if kind == "argmax":
        hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(p.dtype)
        p = p + (hard - p).detach()
    mean = p.mean(0)
    sample = -(p * log_p).sum(-1).mean()
    marginal = -(mean * (mean + eps).log()).sum()
    return sample, marginal
