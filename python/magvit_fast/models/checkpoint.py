"""Presets and checkpoints: how a model is named, stored and found again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from magvit_fast.models.presets import preset

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedMixin:
    """from_preset for a model whose constructor takes one config dataclass."""

    config_class: ClassVar[type[Any]]

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A freshly initialized model of a named configuration.

        Args:
            name: see models.presets.
            changes: config fields that differ from the preset.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown config field.
        """
        return cls(cls.config_class(**{**preset(cls.__name__, name), **changes}))  # type: ignore[call-arg]
