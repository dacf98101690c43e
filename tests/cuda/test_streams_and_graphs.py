"""On a device: every op on a side stream, captured in a CUDA graph and replayed on new inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import gpu_models
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.testing.budgets import assert_equal

pytestmark = pytest.mark.cuda

Call = Callable[..., Any]


def _conv(x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = mf.causal_conv3d(x, weight, time_mode="replicate", impl="native")
    return [y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))]


def _entropy(z: Tensor) -> list[Tensor]:
    z = z.detach().requires_grad_()
    values = mf.lfq_entropy(z, impl="native")
    return [*values, *torch.autograd.grad(values[0] - values[1], z)]


def _embedding(ids: Tensor, weight: Tensor) -> list[Tensor]:
    weight = weight.detach().requires_grad_()
    out = mf.factorized_embedding(ids, weight, impl="native")
    return [out, *torch.autograd.grad(out, weight, torch.ones_like(out))]


def _remask(logits: Tensor, tokens: Tensor, unknown: Tensor, count: Tensor) -> list[Tensor]:
    return list(
        mf.confidence_remask(
            logits, tokens, unknown, num_unknown=count, choice_temperature=1.0, impl="native"
        )
    )


def _ops() -> dict[str, tuple[Call, Callable[[], list[Tensor]]]]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda")

    def randint(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, device="cuda")

    return {
        "causal_conv3d": (_conv, lambda: [randn(1, 16, 3, 9, 9), randn(24, 16, 3, 3, 3)]),
        "causal_conv3d_bfloat16": (
            _conv,
            lambda: [randn(1, 16, 3, 9, 9).bfloat16(), randn(24, 16, 3, 3, 3).bfloat16()],
        ),
        "lfq_quantize": (
            lambda z: list(mf.lfq_quantize(z, impl="native")), lambda: [randn(2, 18, 3, 4, 4)],
        ),
        "lfq_codes": (
            lambda i: [mf.lfq_codes(i, 18, impl="native")], lambda: [randint(2**18, 2, 3, 4)],
        ),
        "lfq_entropy": (_entropy, lambda: [randn(2, 10, 50) * 0.02]),
        "factorized_embedding": (_embedding, lambda: [randint(4096, 2, 30), randn(2, 64, 24)]),
        "confidence_remask": (
            _remask,
            lambda: [randn(2, 50, 2, 64), randint(4096, 2, 50), randint(2, 2, 50).bool(),
                     randint(20, 2)],
        ),
    }  # fmt: skip


NAMES = ["causal_conv3d", "causal_conv3d_bfloat16", "lfq_quantize", "lfq_codes", "lfq_entropy",
         "factorized_embedding", "confidence_remask"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_side_stream(name: str) -> None:
    call, make = _ops()[name]
    inputs = make()
    expected = call(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Delays the stream, so that work on another one would come too early to see the inputs.
        late = [torch.empty_like(t) for t in inputs]
        torch.cuda._sleep(20_000_000)
        for to, source in zip(late, inputs, strict=True):
            to.copy_(source)
        actual = call(*late)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


@pytest.mark.parametrize("name", NAMES)
def test_graph_replay(name: str) -> None:
    call, make = _ops()[name]
    static = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*static)
    for _ in range(2):
        fresh = make()
        for to, source in zip(static, fresh, strict=True):
            to.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        for a, e in zip(outputs, call(*fresh), strict=True):
            assert_equal(a, e)


def test_offsets_beyond_32_bits() -> None:
    # The last frame lies beyond 2**31 elements; 16 channels keep the work small.
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    size = (1, 16, 132, 1024, 1024)
    x = torch.zeros(size, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last_3d
    )
    assert x.numel() > 2**31
    x[:, :, -1, -3:, -3:] = torch.randn(1, 16, 3, 3, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8, 16, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    y = mf.causal_conv3d(x, weight, impl="native")
    corner = mf.causal_conv3d(x[:, :, -1:, -6:, -6:].contiguous(), weight, impl="native")
    assert_equal(y[:, :, -1, -5:, -5:], corner[:, :, 0, -5:, -5:])
    assert not bool(y[:, :, :-1].any())


def test_generation_is_one_graph() -> None:
    """Decoding loop and decoder: nothing waits for the device, and a replay reads new inputs."""
    row = gpu_models.generation_row("cuda", "magvit-v2-demo", "magvit-v2-demo", batch=2, steps=3)
    *models, settings, condition, classes = row.make()
    side = torch.cuda.Stream()
    with _native.default_impl("native"):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gpu_models.generate_clip(*models, settings, condition, classes)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            video = gpu_models.generate_clip(*models, settings, condition, classes)
        for first in (0, 50):
            classes.copy_(torch.arange(first, first + 2, device="cuda"))
            graph.replay()
            again = gpu_models.generate_clip(*models, settings, condition, classes)
            assert_equal(video, again)
