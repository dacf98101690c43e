"""The schedule of the sm_90a kernel (csrc/causal_conv3d/sm90_plan.h), walked step by step on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

import magvit_fast as mf
from magvit_fast import _native

op = importlib.import_module("magvit_fast.ops.causal_conv3d")  # the module, not the function
Array = np.ndarray[Any, np.dtype[np.float64]]
DEPTH, CHANNELS = 64, 128


def _numbers(
    channels: tuple[int, int], size: tuple[int, int, int], batch: int, history: int,
    kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: list[int] | None,
    time_mode: str,
) -> tuple[list[int], list[int]]:  # fmt: skip
    geometry = op.Geometry(
        list(stride),
        [1, 1, 1],
        1,
        op.resolve_padding(kernel, (1, 1, 1), padding),
        time_mode,
        "zeros",
    )
    sources = (size[0] + history, *size[1:])
    cut = geometry._replace(padding=[geometry.padding[0] - history, *geometry.padding[1:]])
    y_size = [batch, channels[1], *(cut.out_size(a, sources[a], kernel[a]) for a in range(3))]
    numbers = op._shape_numbers(
        (batch, channels[0], *size), history, y_size, kernel, torch.bfloat16, geometry
    )
    return numbers, y_size


class Walk:
    """Reads the flat list of causal_conv3d_sm90_walk."""

    def __init__(self, numbers: list[int], forward: bool, multiprocessors: int) -> None:
        flat = _native.core().causal_conv3d_sm90_walk(numbers, forward, multiprocessors)
        assert flat
        self.box_w, self.box_h, self.box_n, self.views = flat[:4]
        self.tiles = []
        at = 4
        while at < len(flat):
            head, steps = flat[at : at + 8], flat[at + 7]
            at += 8
            body = np.array(flat[at : at + 7 * steps]).reshape(steps, 7)
            self.tiles.append((head, body))
            at += 7 * steps


def _box(tensor: Array, n: int, t: int, h: int, w: int, c: int, walk: Walk) -> Array:
    """[box_n, box_h, box_w, 64] of [N, T, H, W, C] at any place, zeros outside."""
    out = np.zeros((walk.box_n, walk.box_h, walk.box_w, DEPTH))
    assert 0 <= t < tensor.shape[1], "a step that reads no frame"
    from_, to = [], []
    for first, count, size in ((n, walk.box_n, tensor.shape[0]), (h, walk.box_h, tensor.shape[2]),
                               (w, walk.box_w, tensor.shape[3]), (c, DEPTH, tensor.shape[4])):  # fmt: skip
        low, high = max(first, 0), max(min(first + count, size), max(first, 0))
        from_.append(slice(low, high))
        to.append(slice(low - first, high - first))
    out[tuple(to)] = tensor[from_[0], t, from_[1], from_[2], from_[3]]
    return out


def _views(tensor: Array, stride: tuple[int, ...]) -> list[Array]:
    return [tensor[:, :, h :: stride[1], w :: stride[2]]
            for h in range(stride[1]) for w in range(stride[2])]  # fmt: skip


def _follow(
    walk: Walk, weight: Array, sources: list[Array], targets: list[Array], counts: list[Array],
    split: int,
) -> None:  # fmt: skip
    """Does what the kernel does, box by box; weight [taps, produced, summed], targets as views."""
    classes = len(targets) // 2
    for (_, cls, c, w, h, t, n, _), steps in walk.tiles:
        sums = np.zeros((walk.box_n, walk.box_h, walk.box_w, CHANNELS))
        for view, depth, sw, sh, st, sn, tap in steps:
            box = _box(sources[view], sn, st, sh, sw, depth, walk)
            rows = weight[tap, c : c + CHANNELS, depth : depth + DEPTH]
            sums[..., : rows.shape[0]] += box[..., : rows.shape[1]] @ rows.T
        early = t < split
        to = targets[cls + (classes if early else 0)][:, t if early else t - split]
        count = counts[cls + (classes if early else 0)][:, t if early else t - split]
        place = np.s_[n : n + walk.box_n, h : h + walk.box_h, w : w + walk.box_w, c : c + CHANNELS]
        shape = to[place].shape
        assert min(shape) > 0, "a tile outside of its target"
        to[place] = sums[: shape[0], : shape[1], : shape[2], : shape[3]]
        count[place] += 1


CASES: dict[str, dict[str, Any]] = {
    "one_tile": {},
    "ragged": {"channels": (72, 136), "size": (3, 9, 17), "batch": 2},
    "batch_in_a_tile": {"size": (2, 3, 4), "batch": 5},
    "large_frame": {"size": (2, 24, 40)},
    "history": {"history": 2},
    "short_history": {"history": 1, "time_mode": "replicate"},
    "replicate": {"time_mode": "replicate"},
    "reflect": {"time_mode": "reflect"},
    "stride_2": {"kernel": (4, 4, 4), "stride": (2, 2, 2), "size": (5, 7, 9), "history": 1},
    "stride_in_width": {"stride": (1, 1, 4), "size": (2, 4, 11)},
    "skipped_pixels": {"kernel": (1, 1, 1), "stride": (2, 2, 2), "size": (4, 5, 6)},
    "both_ends": {"padding": [1, 1, 0, 2, 2, 0]},
}
DEFAULTS: dict[str, Any] = {
    "channels": (64, 64), "size": (3, 5, 6), "batch": 1, "history": 0, "kernel": (3, 3, 3),
    "stride": (1, 1, 1), "padding": None, "time_mode": "zeros",
}  # fmt: skip


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "input_grad"])
@pytest.mark.parametrize("name", CASES)
def test_walk_computes_the_convolution(name: str, forward: bool) -> None:
    case = {**DEFAULTS, **CASES[name]}
    numbers, y_size = _numbers(**case)
    (c_in, c_out), size, kernel, stride = (
        case[k] for k in ("channels", "size", "kernel", "stride")
    )
    batch, history = case["batch"], case["history"]
    torch.manual_seed(0)
    draw = lambda *s: torch.randint(-3, 4, s).double().requires_grad_()  # noqa: E731
    x, weight = draw(batch, c_in, *size), draw(c_out, c_in, *kernel)
    earlier = draw(batch, c_in, history, *size[1:]) if history else None
    y = mf.causal_conv3d(x, weight, stride=stride, padding=case["padding"], history=earlier,
                         time_mode=case["time_mode"], impl="reference")  # fmt: skip
    assert list(y.shape) == y_size
    to_array = lambda v: v.detach().movedim(1, -1).contiguous().numpy()  # noqa: E731
    by_tap = weight.detach().flatten(2).permute(2, 0, 1).numpy()
    walk = Walk(numbers, forward, 5)
    if forward:
        sources = _views(to_array(x), stride)
        sources += _views(to_array(earlier), stride) if history else []
        assert walk.views == stride[1] * stride[2]
        result = np.full((batch, *y_size[2:], c_out), np.nan)
        count = np.zeros_like(result)
        _follow(walk, by_tap, sources, [result] * 2, [count] * 2, 0)
        np.testing.assert_array_equal(count, 1)
        np.testing.assert_array_equal(result, to_array(y))
        return
    dy = torch.randint(-3, 4, y.shape).double()
    grads = torch.autograd.grad(y, [x, earlier] if history else [x], dy)
    results = [np.full((batch, frames, *size[1:], c_in), np.nan) for frames in (size[0], history)]
    counts = [np.zeros_like(r) for r in results]
    _follow(walk, by_tap.transpose(0, 2, 1), [to_array(dy)],
            [v for r in results for v in _views(r, stride)],
            [v for c in counts for v in _views(c, stride)], history)  # fmt: skip
    for result, count, grad in zip(results, counts, grads, strict=False):
        np.testing.assert_array_equal(count, 1)
        np.testing.assert_array_equal(result, to_array(grad))


def test_taps_before_the_clip_cost_nothing() -> None:
    numbers, _ = _numbers(**{**DEFAULTS, "size": (5, 16, 16)})
    steps = {head[5]: head[7] for head, _ in Walk(numbers, True, 132).tiles}
    assert steps == {0: 9, 1: 18, 2: 27, 3: 27, 4: 27}


@pytest.mark.parametrize(
    ("channels", "size", "batch", "least"),
    [(512, (5, 16, 16), 8, 0.95), (256, (9, 32, 32), 8, 0.85), (128, (17, 32, 32), 8, 0.95)],
)
def test_blocks_share_the_work(
    channels: int, size: tuple[int, int, int], batch: int, least: float
) -> None:
    # 132 multiprocessors; the first of these has 160 tiles of three lengths.
    numbers, _ = _numbers(**{**DEFAULTS, "channels": (channels,) * 2, "size": size, "batch": batch})
    load = np.zeros(132)
    for head, _ in Walk(numbers, True, 132).tiles:
        load[head[0]] += head[7]
    assert load.mean() / load.max() >= least


@pytest.mark.parametrize(
    "change", [{"channels": (56, 64)}, {"channels": (68, 64)}, {"stride": (1, 3, 3)}], ids=str
)
def test_what_it_does_not_serve(change: dict[str, Any]) -> None:
    numbers, _ = _numbers(**{**DEFAULTS, **change})
    assert _native.core().causal_conv3d_sm90_walk(numbers, True, 5) == []


def test_descriptor_bits() -> None:
    # PTX ISA, matrix descriptor: address / 16 in bits 0-13, leading dimension / 16 in 16-29, stride
    # dimension / 16 in 32-45 (eight rows of 128 bytes), base offset in 49-51, 128-byte swizzle = 1 in 62-63.
    for address in (0, 1024, 0x8400, 227 * 1024, 0x2420):
        bits = _native.core().causal_conv3d_wgmma_descriptor(address)
        fields = [(bits >> low) & ((1 << width) - 1)
                  for low, width in ((0, 14), (16, 14), (32, 14), (49, 3), (62, 2))]  # fmt: skip
        assert fields == [address // 16, 1, 1024 // 16, 0, 1]
        assert bits == fields[0] | 1 << 16 | 64 << 32 | 1 << 62  # and nothing in between


def test_swizzle_moves_16_byte_pieces_by_their_row() -> None:
    swizzle = _native.core().causal_conv3d_swizzle
    for row in range(16):
        pieces = [swizzle(row * 128 + piece * 16 + 6) for piece in range(8)]
        assert pieces == [row * 128 + (piece ^ row % 8) * 16 + 6 for piece in range(8)]
