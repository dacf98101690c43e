"""mf.generate beyond one clip: sliding windows, other sizes, pieces as they come."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from tests.decoding.pairs import clip

import magvit_fast as mf
from magvit_fast.decoding import MaskedDecoding, generate_tokens
from magvit_fast.models import (
    MagvitV2Tokenizer,
    MaskedTransformer,
)
from magvit_fast.tasks import TASKS


def test_long_videos_by_sliding(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    video = clip(5)
    run = lambda frames: mf.generate(  # noqa: E731
        tokenizer, transformer, task="frame_prediction", video=video, steps=2, frames=frames
    )
    one, long = run(None), run(40)
    assert long.shape[2] == 40
    assert torch.equal(long[:, :, :17], one)
    assert torch.equal(run(10), one[:, :, :10])
    assert torch.equal(run(29), long[:, :, :29])  # exactly two windows


@pytest.mark.parametrize("given", [5, 9, 13])
def test_long_videos_are_the_whole_decode_of_their_tokens(
    given: int, tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    """By hand: each window from the frames of what is there, its new slots behind the others."""
    task = dataclasses.replace(TASKS["frame_prediction"], first=given)
    new = 17 - given
    made = mf.generate(
        tokenizer, transformer, task=task, video=clip(given), steps=2, frames=17 + 2 * new
    )
    slots: list[torch.Tensor] = []
    video = clip(given)
    for window in range(3):
        ids = generate_tokens(
            tokenizer, transformer, task, MaskedDecoding(steps=2), video=video,
            first_step=2 * window,
        )  # fmt: skip
        slots.append(ids if window == 0 else ids[:, 1 + (given - 1) // 4 :])
        video = made[:, :, : 17 + window * new][:, :, -given:]
    whole = tokenizer.decode(torch.cat(slots, dim=1)).detach()
    assert whole.shape == made.shape
    torch.testing.assert_close(made, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "positions", "size"),
    [((5, 2, 3), "corner", (8, 12)), ((3, 4, 4), "corner", (16, 16)),
     ((5, 4, 7), "interpolate", (16, 28)), ((7, 4, 4), "interpolate", (16, 16))],
)  # fmt: skip
def test_other_sizes_and_lengths(
    grid: Any,
    positions: Any,
    size: tuple[int, int],
    tokenizer: MagvitV2Tokenizer,
    transformer: MaskedTransformer,
) -> None:
    """The tokenizer takes any size; the transformer by its corner, or by interpolated positions."""
    model = transformer.with_grid(grid, positions)
    frames = 1 + 4 * (grid[0] - 1)
    video = torch.rand(1, 3, 5, *size, generator=torch.Generator().manual_seed(0))
    run = {"task": "frame_prediction", "video": video, "steps": 2}
    out = mf.generate(tokenizer, model, **run)  # type: ignore[arg-type]
    assert out.shape == (1, 3, frames, *size)
    long = mf.generate(tokenizer, model, **run, frames=frames + 3)  # type: ignore[arg-type]
    assert torch.equal(long[:, :, :frames], out)
    if size != (16, 16):
        with pytest.raises(ValueError, match=r"expected 16x16 pixels .* by with_grid"):
            mf.generate(tokenizer, transformer, **run)  # type: ignore[arg-type]


def test_given_frames_within_a_slot_decode_each_clip_by_itself(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    task = dataclasses.replace(TASKS["frame_prediction"], first=3)
    made = mf.generate(tokenizer, transformer, task=task, video=clip(3), steps=2, frames=31)
    settings = MaskedDecoding(steps=2)
    ids = generate_tokens(
        tokenizer, transformer, task, settings, video=made[:, :, 14:17], first_step=2
    )
    torch.testing.assert_close(made[:, :, 17:], tokenizer.decode(ids)[:, :, 3:].detach())


def test_pieces_come_when_they_are_asked_for(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    passes: list[int] = []
    hook = transformer.register_forward_hook(lambda *_: passes.append(1))
    arguments: dict[str, Any] = {
        "task": "frame_prediction", "video": clip(5), "steps": 2, "frames": 60,
    }  # fmt: skip
    transformer.train()
    try:
        stream = mf.decoding.generate_stream(tokenizer, transformer, **arguments)
        assert passes == []
        first = next(stream)
        assert len(passes) == 2
        assert first.shape[2] < 60
        assert transformer.training  # not changed between pieces
        assert not first.requires_grad
        rest = list(stream)
    finally:
        hook.remove()
        transformer.eval()
    assert len(passes) == 2 * 5
    whole = torch.cat([first, *rest], dim=2)
    assert torch.equal(whole, mf.generate(tokenizer, transformer, **arguments))
    with pytest.raises(ValueError, match="steps: expected 1 or more"):  # at once
        mf.decoding.generate_stream(tokenizer, transformer, **{**arguments, "steps": 0})


def test_what_is_made_is_not_kept(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the decoded pieces and token grids of ten windows only the newest are alive."""
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    whole = tokenizer.decode_stream

    def watched(ids: torch.Tensor, **more: Any) -> Any:
        seen.append(weakref.ref(ids))
        for piece in whole(ids, **more):
            seen.append(weakref.ref(piece))
            yield piece

    monkeypatch.setattr(tokenizer, "decode_stream", watched)
    frames = 0
    for piece in mf.decoding.generate_stream(
        tokenizer, transformer, task="frame_prediction", video=clip(5), steps=1, frames=17 + 12 * 9
    ):
        frames += piece.shape[2]
        alive.append(sum(ref() is not None for ref in seen))
    assert frames == 17 + 12 * 9
    assert len(seen) > 20
    assert max(alive) <= 4
