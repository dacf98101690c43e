"""The papers' decoding settings, as arguments of generate: `generate(..., **published("..."))`."""

from __future__ import annotations

from typing import Any

from magvit_fast.decoding.schedules import Guidance

# MAGVIT-v2's scale 25 is w in u + w (c - u); ours is w - 1. "Temperature scaling", which goes with it,
# is not specified: choice_temperature and temperature are free to change.
_GUIDED = Guidance(24.0, "cosine_power", power=4.0)


def _settings(steps: int, schedule: str, choice: float, **more: Any) -> dict[str, Any]:
    return {"steps": steps, "schedule": schedule, "choice_temperature": choice, **more}


_PUBLISHED: dict[str, dict[str, Any]] = {
    # MAGVIT, table 10 and the released configs.
    "magvit": _settings(12, "cosine", 4.5),
    "magvit-bair": _settings(12, "exp", 400.0),
    "magvit-kinetics600": _settings(12, "uniform", 7.5),
    # MAGVIT-v2, appendix: video with 12 or 24 steps; ImageNet with 64 (or 12) steps. The temperatures
    # are known from one set of notes alone.
    "magvit-v2-video": _settings(12, "cosine", 32.0),
    "magvit-v2-video-24": _settings(24, "cosine", 32.0),
    "magvit-v2-image-256": _settings(64, "cosine", 15.0),
    "magvit-v2-image-512": _settings(64, "cosine", 30.0),
    "magvit-v2-image-256-guided": _settings(64, "cosine", 15.0, guidance=_GUIDED),
    "magvit-v2-image-512-guided": _settings(64, "cosine", 15.0, guidance=_GUIDED),
}

PUBLISHED_NAMES = tuple(_PUBLISHED)


def published(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of `generate` for one of PUBLISHED_NAMES, with changes.

    Example:
        >>> settings = published("magvit-v2-image-512-guided", steps=12)
        >>> image = generate(tokenizer, transformer, task="class_generation", class_id=7, **settings)

    Raises:
        ValueError: another name.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"name: expected one of {', '.join(_PUBLISHED)}, got {name!r}")
    return {**_PUBLISHED[name], **changes}
