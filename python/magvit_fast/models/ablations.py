"""The steps from MAGVIT to MAGVIT-v2 as changes of config fields (MAGVIT-v2, tables 5b and 5c).

Each step keeps the changes of the ones before it. What the tables name is known, the step labels
are not certain in every word; sizes are the preset's that the changes are applied to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_MAGVIT: dict[str, Any] = {
    "quantizer": "vq",
    "num_bits": 10,
    "resample": "pool",
    "num_res_blocks": 2,
    "adaptive_norm": False,
}
_VIDEO: dict[str, Any] = {**_MAGVIT, "temporal_downsample": (True, True, False)}


@dataclass(frozen=True)
class AblationStep:
    """One row of a table: what changes in MagvitV2Config and in DiscriminatorConfig."""

    name: str
    tokenizer: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Any] = field(default_factory=dict)


_TABLES: dict[str, tuple[AblationStep, ...]] = {
    # Images (ImageNet at 128 pixels): rFID 2.65, 2.48, 1.34, 1.21, 1.20, 1.15.
    "5b": (
        AblationStep("magvit", _MAGVIT, {"pooling": "average"}),
        AblationStep("lfq", {"quantizer": "lfq"}),
        AblationStep("large_vocabulary", {"num_bits": 18}),
        AblationStep("up_and_down_sampler", {"resample": "conv"}),
        AblationStep("deeper", {"num_res_blocks": 4}),
        AblationStep("adaptive_norm", {"adaptive_norm": True}),
    ),
    # Video (UCF-101): rFVD 24.55, 16.12, 15.37, 11.11, 8.90, 8.62. The adaptive norm of table 5b is
    # in none of its rows; the published model has both.
    "5c": (
        AblationStep("magvit", _VIDEO, {"pooling": "average"}),
        AblationStep("lfq_and_large_vocabulary", {"quantizer": "lfq", "num_bits": 18}),
        AblationStep("up_and_down_sampler", {"resample": "conv"}),
        AblationStep("late_temporal_downsampling", {"temporal_downsample": (False, True, True)}),
        AblationStep("deeper", {"num_res_blocks": 4}),
        AblationStep("blur_pool", {}, {"pooling": "blur"}),
    ),
}


def ablation_steps(table: str) -> list[AblationStep]:
    """The rows of table "5b" (images) or "5c" (video), each with all changes up to it.

    Example:
        >>> for step in ablation_steps("5c"):
        ...     tokenizer = MagvitV2Tokenizer.from_preset("magvit-v2-small", **step.tokenizer)

    Raises:
        ValueError: another table.
    """
    if table not in _TABLES:
        raise ValueError(f"table: expected one of {', '.join(_TABLES)}, got {table!r}")
    rows: list[AblationStep] = []
    tokenizer: dict[str, Any] = {}
    discriminator: dict[str, Any] = {}
    for step in _TABLES[table]:
        tokenizer = {**tokenizer, **step.tokenizer}
        discriminator = {**discriminator, **step.discriminator}
        rows.append(AblationStep(step.name, tokenizer, discriminator))
    return rows
