"""The memory of a stream and the regrouping of its pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from magvit_fast.nn.conv import CausalConv3d
from magvit_fast.nn.resample import Upsample, strided_conv
from magvit_fast.nn.stream import StreamState, rechunk


def chunks_of(length: int, cuts: list[int]) -> list[int]:
    """Lengths of the pieces between sorted cut positions."""
    edges = [0, *sorted(min(c, length) for c in cuts), length]
    return [b - a for a, b in itertools.pairwise(edges)]


@given(
    slots=st.integers(0, 6),
    step=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 31), max_size=6),
    most=st.integers(1, 12),
    started=st.booleans(),
)
def test_rechunk_keeps_order_and_lengths(
    slots: int, step: int, cuts: list[int], most: int, started: bool
) -> None:
    length = step * slots + (0 if started else 1)
    whole = torch.arange(length).view(1, length)
    pieces = list(whole.split(chunks_of(length, cuts), dim=1))
    chunks = list(rechunk(pieces, 1, step=step, most=most, started=started, name="x"))
    assert torch.equal(torch.cat([whole[:, :0], *chunks], 1), whole)
    sizes = [c.shape[1] for c in chunks]
    if not started:
        assert sizes[0] % step == 1 % step
        sizes = sizes[1:]
    assert all(size % step == 0 and 0 < size <= max(most, step) for size in sizes)


@given(step=st.integers(2, 5), slots=st.integers(0, 4), extra=st.integers(1, 4))
def test_rechunk_refuses_a_broken_end(step: int, slots: int, extra: int) -> None:
    extra = 1 + (extra - 1) % (step - 1)
    whole = torch.zeros(1, 1 + step * slots + extra)
    with pytest.raises(ValueError, match=rf"x: the stream ended after .* {extra} of them unused"):
        list(rechunk([whole], 1, step=step, most=8, started=False, name="x"))


def test_rechunk_refuses_an_empty_stream() -> None:
    with pytest.raises(ValueError, match="ended after 0 entries"):
        list(rechunk([], 1, step=4, most=8, started=False, name="x"))


@pytest.mark.parametrize(
    ("piece", "error"),
    [
        (torch.zeros(2, 3, 4), ValueError),
        (torch.zeros(1, 3, 5), ValueError),
        (torch.zeros(1, 3, 4, dtype=torch.float64), ValueError),
        (torch.zeros(1, 3), ValueError),
        ("frames", TypeError),
    ],
)
def test_rechunk_refuses_unlike_pieces(piece: object, error: type[Exception]) -> None:
    pieces = iter([torch.zeros(1, 2, 4), piece])
    with pytest.raises(error, match="frames: expected"):
        list(rechunk(pieces, 1, step=1, most=8, started=False, name="frames"))  # type: ignore[arg-type]


def stream(layer: torch.nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    state, out = StreamState(), []
    for piece in x.split(sizes, dim=2):
        out.append(layer(piece, state))
        state.started = True
    return torch.cat(out, 2)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("time_stride", [1, 2])
@pytest.mark.parametrize("time_mode", ["replicate", "zeros"])
def test_a_layer_in_chunks_is_the_layer_on_the_whole(
    kernel: int, time_stride: int, time_mode: str
) -> None:
    if kernel < time_stride:
        return
    torch.manual_seed(0)
    layer = CausalConv3d(2, 3, (kernel, 3, 3), (time_stride, 1, 1), time_mode=time_mode).double()  # type: ignore[arg-type]
    x = torch.randn(1, 2, 13, 4, 5, dtype=torch.float64)
    whole = layer(x)
    for sizes in ([1, *[time_stride] * (12 // time_stride)], [1 + time_stride, 12 - time_stride]):
        torch.testing.assert_close(stream(layer, x, sizes), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("temporal", [False, True])
def test_resampling_in_chunks(temporal: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 4, 6, dtype=torch.float64)
    down, up = (kind(4, temporal=temporal).double() for kind in (strided_conv, Upsample))
    torch.testing.assert_close(stream(down, x, [1, 2, 4, 2]), down(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(stream(up, x, [2, 3, 1, 3]), up(x), rtol=0, atol=1e-13)


def test_the_memory_is_a_copy_and_does_not_grow() -> None:
    layer = CausalConv3d(2, 2, 3)
    state = StreamState()
    sizes = []
    for frames in (1, 7, 2, 40, 1):
        x = torch.randn(1, 2, frames, 4, 4)
        with torch.no_grad():
            layer(x, state)
        state.started = True
        held = state.history(layer)
        assert held is not None
        assert held.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        sizes.append(state.num_bytes())
    assert sizes[1:] == [2 * 2 * 16 * 4] * 4


def test_a_kernel_shorter_than_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size: expected at least the stride 2"):
        CausalConv3d(2, 2, 1, (2, 1, 1))
