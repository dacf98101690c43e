"""What a causal network remembers between the chunks of one video."""

from __future__ import annotations

from torch import Tensor, nn


class StreamState:
    """The memory of one stream: for each causal layer, the last input frames that it will still read.

    One object belongs to one video and is never kept on a module, so that one model can serve many
    streams at once. Its size depends on the layers and the frame size, not on the video's length.

    Attributes:
        started: False until the first chunk has gone through; a continuing chunk pads and drops nothing.
    """

    def __init__(self) -> None:
        self.started = False
        self._history: dict[nn.Module, Tensor] = {}

    def history(self, layer: nn.Module) -> Tensor | None:
        """Frames [B, C, T_h, H, W] before the coming chunk as `layer` saw them, or None at the start."""
        return self._history.get(layer)

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Replace the memory of `layer`; the frames are copied, so that no chunk is kept alive by a view."""
        self._history[layer] = frames.clone()

    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(t.numel() * t.element_size() for t in self._history.values())
