"""The geometry that CPU and CUDA kernels share (csrc/causal_conv3d/index_map.h), against torch's padding."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from magvit_fast import _native

MODES = ("zeros", "replicate", "reflect")


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, int, int]:
    """source, out, kernel, stride, dilation, front, mode, and back."""
    mode = draw(st.integers(0, 2))
    source = draw(st.integers(1, 7))
    most = source - 1 if mode == 2 else 5
    front, back = draw(st.integers(0, most)), draw(st.integers(0, most))
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dilation = draw(st.integers(1, 3))
    padded = source + front + back
    hypothesis.assume(padded >= dilation * (kernel - 1) + 1)
    out = (padded - dilation * (kernel - 1) - 1) // stride + 1
    return source, out, kernel, stride, dilation, front, mode, back


@pytest.fixture
def core():
    return _native.core()


def _padded_sources(source: int, front: int, back: int, mode: int) -> list[int]:
    """What F.pad puts at every padded position: the source element, or -1 for zeros."""
    cells = torch.arange(1.0, source + 1).view(1, 1, 1, source)  # 0 is left for the padding
    name = "constant" if mode == 0 else MODES[mode]
    padded = F.pad(cells, (front, back, 0, 0), mode=name)
    return [int(v) - 1 for v in padded.flatten()]


@hypothesis.given(axes())
@hypothesis.settings(max_examples=200, suppress_health_check=list(hypothesis.HealthCheck))
def test_source_index_is_torch_padding(core, axis) -> None:
    source, out, kernel, stride, dilation, front, mode, back = axis
    cells = _padded_sources(source, front, back, mode)
    for o in range(out):
        for k in range(kernel):
            got = core.causal_conv3d_source_index(list(axis[:7]), o, k)
            assert got == cells[o * stride + k * dilation]


@hypothesis.given(axes())
@hypothesis.settings(max_examples=200, suppress_health_check=list(hypothesis.HealthCheck))
def test_readers_invert_source_index(core, axis) -> None:
    source, out, kernel, *_ = axis
    numbers = list(axis[:7])
    read = {(s, k): [] for s in range(source) for k in range(kernel)}
    for o in range(out):
        for k in range(kernel):
            s = core.causal_conv3d_source_index(numbers, o, k)
            if s >= 0:
                read[s, k].append(o)
    for (s, k), outputs in read.items():
        assert sorted(core.causal_conv3d_readers(numbers, s, k)) == outputs
