"""What the CPU benchmarks hold our kernels against does the same work."""

from __future__ import annotations

import pytest
import torch
from benchmarks import (
    bench_blur_pool3d,
    bench_causal_conv3d,
    bench_factorized_embedding,
    bench_group_norm_silu,
)

import magvit_fast as mf


@pytest.mark.parametrize("size", [(1, 4, 5, 6, 8), (2, 3, 4, 7, 1)], ids=str)
def test_two_average_pools_are_the_blur(size: tuple[int, ...]) -> None:
    x = torch.randn(size)
    expected = mf.blur_pool3d(x, impl="reference")
    torch.testing.assert_close(bench_blur_pool3d._pools(x), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_one_bag_is_the_sum_of_embeddings(groups: int) -> None:
    ids = torch.randint(0, 16**groups, (3, 7))
    weight, mask, vector = torch.randn(groups, 16, 8), torch.rand(3, 7) < 0.5, torch.randn(8)
    expected = mf.factorized_embedding(
        ids, weight, mask=mask, mask_embedding=vector, impl="reference"
    )
    for way in (bench_factorized_embedding._torch, bench_factorized_embedding._torch_bag):
        torch.testing.assert_close(way(ids, weight, mask, vector), expected)


@pytest.mark.parametrize("cell", [None, [2, 2, 2]], ids=str)
def test_silu_in_place_leaves_the_input_alone(cell: list[int] | None) -> None:
    x, weight, bias = torch.randn(1, 8, 4, 6, 6), torch.randn(8), torch.randn(8)
    maps = [torch.randn(1, 8, 2, 3, 3) for _ in range(2)] if cell else []
    problem = {"groups": 4, **({"cell": cell} if cell else {})}
    before = x.clone()
    y = bench_group_norm_silu._torch(x, weight, bias, maps, problem)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    expected = bench_group_norm_silu._native(x, weight, bias, maps, problem)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [bench_causal_conv3d._native, bench_causal_conv3d._torch])
def test_a_training_step_meets_changed_weights(way: object) -> None:
    x, w, b = torch.randn(1, 4, 3, 5, 6), torch.randn(6, 4, 3, 3, 3), torch.randn(6)
    dy, problem = torch.randn(1, 6, 3, 5, 6), {"channels": [4, 6]}
    step = way(x, w, b, dy, problem, "training")  # type: ignore[operator]
    before = w._version
    for _ in range(2):
        grads = step()
    assert w._version == before + 2  # the leaf shares memory and counter with w
    leaves = [v.clone().requires_grad_() for v in (x, w)]
    y = mf.causal_conv3d(*leaves, b, impl="reference")
    for actual, expected in zip(grads, torch.autograd.grad(y, leaves, dy), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
