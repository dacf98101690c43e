"""Videos longer than a clip: windows that slide, decoded as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from magvit_fast.decoding._inputs import Tokenizer, evaluation
from magvit_fast.models.video_tokenizer import VideoTokenizer
from magvit_fast.nn.stream import StreamState

# (number of the window, its given frames) -> tokens of its clip, int64 [B, T', H', W']
WindowTokens = Callable[[int, Tensor | None], Tensor]


def slide(
    tokenizer: Tokenizer,
    tokens: WindowTokens,
    video: Tensor | None,
    windows: int,
    given: int,
    frames: int,
) -> Iterator[Tensor]:
    """Pieces [B, C, n, H, W] of `windows` clips that overlap by `given` frames, `frames` in all.

    The first window is given `video`, each later one the last frames of what is there. See
    generate.generate_stream for how they are decoded.
    """
    state = StreamState() if _continues(tokenizer, windows, given) else None
    left = frames
    for window in range(windows):
        ids = tokens(window, video)
        pieces = (
            _continued(tokenizer, ids, state, given if window else 0)
            if isinstance(tokenizer, VideoTokenizer) and state is not None
            else _alone(tokenizer, ids, given if window else 0)
        )
        # A clip may add fewer frames than the next one is given.
        recent = [video] if window and video is not None else []
        for piece in pieces:
            if window + 1 < windows:
                recent = [torch.cat([*recent, piece], dim=2)[:, :, -given:]]
            piece = piece[:, :, :left]
            left -= piece.shape[2]
            yield piece
            if not left:
                return
        video = torch.cat(recent, dim=2) if recent else None


def _continues(tokenizer: Tokenizer, windows: int, given: int) -> bool:
    """Whether a window's new slots can follow the slots of the one before."""
    if not isinstance(tokenizer, VideoTokenizer) or not tokenizer.streams:
        return False
    lead = int(tokenizer.config.causal)
    return windows == 1 or (given - lead) % tokenizer.config.time_stride == 0


def _continued(
    tokenizer: VideoTokenizer, ids: Tensor, state: StreamState, given: int
) -> Iterator[Tensor]:
    """The slots behind the given frames, through the decoder as it stands."""
    lead = int(tokenizer.config.causal) if given else 0
    known = lead + (given - lead) // tokenizer.config.time_stride
    pieces = tokenizer.decode_stream(ids[:, known:], state=state)
    while True:
        with evaluation(tokenizer):  # not across a yield: the caller has the models in between
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _alone(tokenizer: Tokenizer, ids: Tensor, given: int) -> Iterator[Tensor]:
    """The whole clip less its version of the given frames."""
    with evaluation(tokenizer):
        clip = tokenizer.decode(ids)
    yield clip[:, :, given:]
