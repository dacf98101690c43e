"""The schedule of the sm_90a weight gradient (csrc/causal_conv3d/sm90_weight_plan.h), walked on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.ops.test_causal_conv3d_sm90_plan import CASES, DEFAULTS, Array, _numbers, _views

import magvit_fast as mf
from magvit_fast import _native

BOX, TILE, BLOCKS = 8, 128, 132


class Walk:
    """What causal_conv3d_sm90_weight_walk tells."""

    def __init__(self, case: dict[str, Any]) -> None:
        numbers, self.y_size = _numbers(**case)
        head, pieces, self.slots_of_tile = _native.core().causal_conv3d_sm90_weight_walk(numbers)
        assert head
        (self.views, self.slots, self.rows, self.longest), *self.runs = head
        self.pieces = [(p[:6], np.array(p[6:]).reshape(-1, 8)) for p in pieces]


def _box(frame: Array, w: int, h: int, rows: int, c: int) -> Array:
    """[rows, BOX, TILE] of [H, W, C] at any place, zeros outside."""
    out = np.zeros((rows, BOX, TILE))
    low = [max(v, 0) for v in (h, w)]
    part = frame[low[0] : max(h + rows, 0), low[1] : max(w + BOX, 0), c : c + TILE]
    at = [v - first for v, first in zip(low, (h, w), strict=True)]
    if min(part.shape):
        out[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1], : part.shape[2]] = part
    return out


def _follow(walk: Walk, dy: Array, sources: list[Array]) -> list[Array | None]:
    """Does what the kernel does, box by box: the slots [taps of the run, channels of dy, of x]."""
    slots: list[Array | None] = [None] * walk.slots
    for (_, run, out, in_, _, slot), steps in walk.pieces:
        taps = walk.runs[run][0]
        sums = np.zeros((taps, TILE, TILE))
        for w, h, t, n, view, x_w, x_h, x_t in steps:
            of_dy = _box(dy[n, t], w, h, BOX, out * TILE).reshape(-1, TILE).T
            assert 0 <= x_t < sources[view].shape[1], "a step that reads no frame"
            of_x = _box(sources[view][n, x_t], x_w, x_h, walk.rows, in_ * TILE)
            for tap in range(taps):  # a tap is a row of the box further down
                sums[tap] += of_dy @ of_x[tap : tap + BOX].reshape(-1, TILE)
        assert slots[slot] is None, "a slot for two pieces"
        slots[slot] = sums
    return slots


def _gradient(walk: Walk, case: dict[str, Any], slots: list[Array | None]) -> Array:
    """[Cout, Cin, KT, KH * KW] from the slots, as the second kernel adds them."""
    c_in, c_out = case["channels"]
    (kt, kh, kw), tiles = case["kernel"], walk.slots_of_tile
    total = np.full((c_out, c_in, kt, kh * kw), np.nan)
    shape = (len(walk.runs), -(-c_out // TILE), -(-c_in // TILE), kt)
    assert len(tiles) == np.prod(shape)
    for (run, out, in_, k), own in zip(np.ndindex(shape), tiles, strict=True):
        sums = np.zeros((walk.runs[run][0], TILE, TILE))
        for slot in own:
            part = slots[slot]
            assert part is not None, "a slot that no block wrote"
            sums += part
        taps, first, step = walk.runs[run]
        place = np.s_[out * TILE : (out + 1) * TILE, in_ * TILE : (in_ + 1) * TILE]
        for tap in range(taps):
            to = total[(*place, k, first + tap * step)]
            assert np.isnan(to).all(), "a tap of two runs"
            to[...] = sums[tap, : to.shape[0], : to.shape[1]]
    assert not np.isnan(total).any()
    used = [slot for own in tiles for slot in own]
    assert sorted(used) == [i for i, part in enumerate(slots) if part is not None]
    return total


MORE = {
    "no_pads": {"padding": [2, 0, 0, 0, 0, 0], "size": (2, 9, 10)},
    "four_rows_of_taps": {"kernel": (1, 4, 2), "size": (2, 9, 5)},
    "five_rows_of_taps": {"kernel": (2, 5, 1), "size": (2, 9, 5)},
    "pointwise": {"kernel": (1, 1, 1), "channels": (136, 72), "size": (2, 9, 8), "batch": 2},
    "stride_in_height": {"stride": (1, 4, 1), "size": (1, 13, 6)},
    "whole_tiles": {"channels": (128, 128), "size": (3, 16, 8)},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_walk_computes_the_gradient(name: str) -> None:
    case = {**DEFAULTS, **{**CASES, **MORE}[name]}
    walk = Walk(case)
    (c_in, c_out), size, stride = (case[k] for k in ("channels", "size", "stride"))
    torch.manual_seed(0)
    draw = lambda *s: torch.randint(-3, 4, s).double()  # noqa: E731
    x = draw(case["batch"], c_in, *size)
    weight = draw(c_out, c_in, *case["kernel"]).requires_grad_()
    frames = case["history"]
    earlier = draw(case["batch"], c_in, frames, *size[1:]) if frames else None
    y = mf.causal_conv3d(x, weight, stride=stride, padding=case["padding"], history=earlier,
                         time_mode=case["time_mode"], impl="reference")  # fmt: skip
    assert list(y.shape) == walk.y_size
    dy = draw(*y.shape)
    (expected,) = torch.autograd.grad(y, weight, dy)
    to_array = lambda v: v.movedim(1, -1).contiguous().numpy()  # noqa: E731
    sources = _views(to_array(x), stride) + (
        [] if earlier is None else _views(to_array(earlier), stride)
    )
    assert walk.views == stride[1] * stride[2]
    slots = _follow(walk, to_array(dy), sources)
    np.testing.assert_array_equal(_gradient(walk, case, slots), expected.flatten(3).numpy())


def test_taps_below_each_other_share_their_boxes() -> None:
    taps = lambda **case: [r[0] for r in Walk({**DEFAULTS, **case}).runs]  # noqa: E731
    assert taps() == [3, 3, 3]
    assert taps(kernel=(3, 4, 4), stride=(2, 2, 2), size=(4, 8, 8)) == [2] * 8
    assert taps(stride=(1, 2, 2), size=(1, 8, 8)) == [1, 2] * 3  # of the even rows, of the odd ones
    assert taps(kernel=(1, 5, 1)) == [3, 2]
    assert taps(kernel=(1, 1, 1)) == [1]
    assert Walk(DEFAULTS).rows == 10
    assert Walk({**DEFAULTS, "kernel": (1, 1, 1)}).rows == 8


def test_frames_that_read_nothing_cost_nothing() -> None:
    steps = dict.fromkeys(range(3), 0)
    for (_, _, _, _, kt, _), body in Walk({**DEFAULTS, "size": (5, 8, 8)}).pieces:
        steps[kt] += len(body)
        assert (body[:, 2] >= 2 - kt).all()
    assert steps == {0: 3 * 3, 1: 3 * 4, 2: 3 * 5}


@pytest.mark.parametrize(
    ("channels", "size"), [(128, (17, 32, 32)), (256, (5, 32, 32)), (512, (5, 16, 16))]
)
def test_blocks_share_the_work(channels: int, size: tuple[int, int, int]) -> None:
    walk = Walk({**DEFAULTS, "channels": (channels,) * 2, "size": size, "batch": 8})
    load, written = np.zeros(BLOCKS, int), np.zeros(BLOCKS, int)
    for (block, *_), body in walk.pieces:
        load[block] += len(body)
        written[block] += 1
    assert load.max() - load.min() <= 1
    # What goes through the workspace is bounded by tiles and blocks, not by their product.
    tiles = len(walk.slots_of_tile)
    assert len(walk.pieces) <= walk.slots == tiles + BLOCKS - 1
    assert written.max() <= -(-tiles // BLOCKS) + 1


@pytest.mark.parametrize(("channels", "walks"), [(128, 3), (256, 12)])
def test_tiles_that_read_alike_run_side_by_side(channels: int, walks: int) -> None:
    # The columns of a 3 x 3 plane, and pairs of channel tiles: 132 / walks blocks each, that read the same boxes
    # of dy at the same time, so that the L2 cache is filled once for all of them.
    size = (6, 32, 32)
    pieces = Walk({**DEFAULTS, "channels": (channels,) * 2, "size": size, "batch": 11}).pieces
    boxes = [np.concatenate([body[:, :4] for (b, *_), body in pieces if b == block])
             for block in range(BLOCKS)]  # fmt: skip
    side = BLOCKS // walks
    for block in range(BLOCKS):
        np.testing.assert_array_equal(boxes[block], boxes[block % side])


@pytest.mark.parametrize(
    "change", [{"channels": (56, 64)}, {"kernel": (17, 1, 1)}, {"stride": (1, 3, 3)}], ids=str
)
def test_what_it_does_not_serve(change: dict[str, Any]) -> None:
    numbers, _ = _numbers(**{**DEFAULTS, **change})
    assert _native.core().causal_conv3d_sm90_weight_walk(numbers) == ([], [], [])


def test_descriptor_bits() -> None:
    # PTX ISA, matrix descriptor, MN-major: leading dimension / 16 in bits 16-29 is the way to the next 64
    # elements of the row, stride dimension / 16 in 32-45 the way to the next eight k.
    for address, leading in ((0, 1024), (0x8400, 1024), (227 * 1024, 10240)):
        bits = _native.core().causal_conv3d_wgmma_descriptor_mn(address, leading)
        assert bits == address // 16 | leading // 16 << 16 | 64 << 32 | 1 << 62
