"""How much of a codebook is in use. Counts add up, so that a data set can be measured in parts."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_counts(ids: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs.

    Args:
        ids: integer tensor of any shape, values in [0, num_codes).
        num_codes: K.

    Returns:
        int64 [K].

    Raises:
        TypeError, ValueError: ids that are not integers or out of range.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids: expected an integer dtype, got {ids.dtype}")
    if num_codes < 1:
        raise ValueError(f"num_codes: expected at least 1, got {num_codes}")
    flat = ids.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= num_codes):
        raise ValueError(
            f"ids: expected values in [0, {num_codes}), got {int(flat.min())} to {int(flat.max())}"
        )
    return torch.bincount(flat, minlength=num_codes)


def codebook_usage(counts: Tensor) -> float:
    """Fraction of the codes that occur at least once. `counts`: [K], see `codebook_counts`."""
    return float((counts > 0).double().mean())


def codebook_perplexity(counts: Tensor) -> float:
    """exp(entropy in nats) of the empirical distribution: K for uniform use, 1 for a single code.

    A plug-in estimate: it cannot exceed the number of tokens counted. 0 without any token.
    """
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0].double() / total
    return float(torch.exp(-(p * p.log()).sum()))
