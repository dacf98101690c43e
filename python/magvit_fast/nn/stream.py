"""What a causal network remembers between the chunks of one video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


class StreamState:
    """The memory of one stream: of each causal layer the input frames that it will still read.

    One object belongs to one video and is never kept on a module, so that one model can serve many
    streams at once. Its size depends on the layers and the frame size, not on the video's length.

    Attributes:
        started: False until the first chunk has gone through; a continuing chunk pads and drops
            nothing.
    """

    def __init__(self) -> None:
        self.started = False
        self._history: dict[nn.Module, Tensor] = {}

    def history(self, layer: nn.Module) -> Tensor | None:
        """Frames [B, C, T_h, H, W] that `layer` saw before the coming chunk; None at the start."""
        return self._history.get(layer)

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Replace the memory of `layer` by a copy (a view would keep its whole chunk alive)."""
        self._history[layer] = frames.clone()

    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(t.numel() * t.element_size() for t in self._history.values())


def in_chunks(
    layer: Callable[..., Tensor], pieces: Iterable[tuple[Tensor, ...]], frames: int
) -> Tensor:
    """layer(*piece, state) for one piece of a video after another, put together along time.

    What lies between the pieces and the result exists for one piece alone, at the price of the
    frames that each layer remembers; StreamState says when that equals the whole.

    Args:
        layer: part of a causal network; its last argument is the state.
        pieces: arguments [B, C, t, H, W] for consecutive frames.
        frames: length of the result.
    """
    state, at = StreamState(), 0
    whole: Tensor | None = None
    for piece in pieces:
        part = layer(*piece, state)
        state.started = True
        if whole is None:
            b, c, _, h, w = part.shape
            layout = torch.channels_last_3d if part.stride(1) == 1 else torch.contiguous_format
            whole = torch.empty(
                (b, c, frames, h, w), dtype=part.dtype, device=part.device, memory_format=layout
            )
        whole[:, :, at : at + part.shape[2]] = part
        at += part.shape[2]
    if whole is None or at != frames:
        raise ValueError(f"frames: expected {at}, the frames of all pieces, got {frames}")
    return whole


def rechunk(
    pieces: Iterable[Tensor], dim: int, *, step: int, most: int, started: bool, name: str
) -> Iterator[Tensor]:
    """Regroup pieces of any lengths along `dim` for a causal network of time stride `step`.

    The first chunk has 1 + step * k entries, the others (all, if the stream has `started`) step * k;
    at most `most`, or the least that is possible. A chunk leaves as soon as it is complete.

    Raises:
        TypeError: a piece is not a Tensor.
        ValueError: a piece differs from the first in another axis, dtype or device; or the whole
            length is no such sum.
    """
    held: Tensor | None = None
    like: Tensor | None = None
    total = 0
    for piece in pieces:
        _check_piece(piece, like, dim, name)
        like = piece if like is None else like
        total += piece.shape[dim]
        held = piece if held is None else torch.cat([held, piece], dim)
        while True:
            size = _chunk_size(held.shape[dim], step, most, started)
            if not size:
                break
            yield held.narrow(dim, 0, size)
            held = held.narrow(dim, size, held.shape[dim] - size)
            started = True
        # A copy: what is left must not keep the whole piece alive.
        held = held.clone()
    left = 0 if held is None else held.shape[dim]
    if left or not started:
        raise ValueError(
            f"{name}: the stream ended after {total} entries along axis {dim}, {left} of them "
            f"unused: expected 1 + {step}k in all (a continued stream: {step}k)"
        )


def _chunk_size(available: int, step: int, most: int, started: bool) -> int:
    first = 0 if started else 1
    if available < first or (started and available < step):
        return 0
    whole = min((available - first) // step, max((most - first) // step, 0 if first else 1))
    return first + step * whole


def _check_piece(piece: Tensor, like: Tensor | None, dim: int, name: str) -> None:
    if not isinstance(piece, Tensor):
        raise TypeError(f"{name}: expected Tensors, got {type(piece).__name__}")
    if like is None:
        if piece.dim() <= dim:
            raise ValueError(f"{name}: expected more than {dim} axes, got {tuple(piece.shape)}")
        return
    same_shape = piece.dim() == like.dim() and all(
        i == dim or a == b for i, (a, b) in enumerate(zip(piece.shape, like.shape, strict=True))
    )
    if not same_shape or piece.dtype != like.dtype or piece.device != like.device:
        raise ValueError(
            f"{name}: expected pieces like the first but for axis {dim}, {tuple(like.shape)} "
            f"{like.dtype} on {like.device}; got {tuple(piece.shape)} {piece.dtype} on "
            f"{piece.device}"
        )
