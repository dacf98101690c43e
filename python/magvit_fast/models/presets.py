"""Named configurations: model class -> preset -> keyword arguments of its config. Data only."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "MagvitV2Tokenizer": {
        # MAGVIT-v2, appendix architecture figure: 376,003,221 parameters, 17x128x128 -> 5x16x16.
        "magvit-v2-base": {
            "filters": 128,
            "channel_multipliers": (1, 2, 2, 4),
            "temporal_downsample": (False, True, True),
            "num_res_blocks": 4,
            "num_bits": 18,
        },
        # The ablation-size model ("58M" in Table 5a): 57,813,333 parameters.
        "magvit-v2-small": {
            "filters": 64,
            "channel_multipliers": (1, 2, 2, 4),
            "temporal_downsample": (False, True, True),
            "num_res_blocks": 2,
            "num_bits": 18,
        },
        # The model of `magvit-fast demo`: 17x64x64 -> 5x8x8 = 320 tokens of 12 bits. 3.7M parameters: shipped
        # as float16 they take 7.4 MB of the 16 MB for all weights (a last width of 128 would take 17.9 MB).
        "magvit-v2-demo": {
            "filters": 16,
            "channel_multipliers": (1, 2, 4, 4),
            "temporal_downsample": (False, True, True),
            "num_res_blocks": 1,
            "num_bits": 12,
            "num_token_groups": 2,
        },
    },
}


def preset(model: str, name: str) -> dict[str, Any]:
    """The keyword arguments of one preset.

    Raises:
        ValueError: there is no such preset; the message lists those there are.
    """
    known = PRESETS.get(model, {})
    if name not in known:
        raise ValueError(
            f"name: {model} has no preset {name!r}; there are {', '.join(known) or 'none'}"
        )
    return dict(known[name])
