"""causal_conv3d by Winograd's algorithm: budgets at both precision settings, every cut of time and frame."""

from __future__ import annotations

import pytest
import torch
from tests.ops.conv_problems import Problem, fp32_precision, make, value_and_grads
from torch import Tensor

from magvit_fast import ops
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

# The stated budget of F(4x4, 3x3) with F(4, 3) in time: a hundred times finer than TF32.
RELATIVE = 1e-5

PROBLEMS = {
    # name: channels, size [T, H, W], and what differs from the defaults
    "whole_tiles": ([16, 16], [5, 8, 8], {}),
    "parts_of_tiles": ([24, 130], [3, 5, 17], {}),
    "odd_channels": ([37, 51], [9, 9, 10], {}),
    "segments_of_time": ([16, 16], [42, 5, 6], {}),
    "replicate": ([20, 40], [17, 9, 6], {"time_mode": "replicate", "space_mode": "replicate"}),
    "reflect": ([16, 32], [4, 7, 7], {"time_mode": "reflect", "space_mode": "reflect"}),
    # large enough for the input gradient, too: the plane, and the lines of its border
    "replicated_planes": (
        [32, 40],
        [5, 24, 26],
        {"time_mode": "replicate", "space_mode": "replicate", "history": 1},
    ),
    "reflected_planes": ([32, 40], [5, 25, 24], {"space_mode": "reflect"}),
    "replicated_on_two_sides": (
        [32, 40],
        [5, 24, 24],
        {"space_mode": "replicate", "padding": [2, 0, 1, 0, 0, 1]},
    ),
    "not_causal": ([16, 16], [7, 6, 6], {"padding": [1, 1, 1, 1, 1, 1], "time_mode": "replicate"}),
    "uneven_pads": ([16, 16], [6, 9, 7], {"padding": [2, 1, 0, 2, 3, 0]}),
    "history": ([16, 48], [6, 6, 6], {"history": 2}),
    "short_history": ([16, 48], [6, 6, 6], {"history": 1, "time_mode": "replicate"}),
    "one_frame": ([32, 32], [1, 12, 12], {"time_mode": "replicate"}),
    "flat_kernel": ([16, 16], [3, 8, 8], {"kernel": [1, 3, 3]}),
    "four_taps": ([16, 16], [6, 8, 8], {"kernel": [4, 3, 3]}),
    "wide": ([160, 200], [5, 8, 8], {}),
    "groups": ([48, 57], [5, 9, 10], {"groups": 3, "history": 1}),
    "groups_of_replicated_planes": (
        [64, 80],
        [4, 24, 26],
        {"groups": 2, "time_mode": "replicate", "space_mode": "replicate"},
    ),
    # The weight gradient cuts the tiles into slices: four, and eight of two tiles in many segments.
    "slices": ([32, 40], [17, 24, 22], {"time_mode": "replicate"}),
    "slices_of_time": ([16, 24], [250, 4, 4], {"time_mode": "replicate", "history": 1}),
}


def _problem(name: str, dtype: torch.dtype = torch.float32) -> Problem:
    channels, size, rest = PROBLEMS[name]
    return make({"channels": channels, "size": size, **rest}, dtype)


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_default_float32_meets_its_stated_budget(name, isa_level) -> None:
    problem = _problem(name)
    exact = value_and_grads(problem.to(torch.float64), "reference")
    ours = value_and_grads(problem.to(torch.float32), "native")
    for key, want in exact.items():
        assert _error(ours[key], want) < RELATIVE, key


@pytest.mark.parametrize("name", PROBLEMS)
def test_strict_float32_errs_no_more_than_plain_torch(name, isa_level) -> None:
    problem = _problem(name)
    exact = value_and_grads(problem.to(torch.float64), "reference")
    with fp32_precision("ieee"):
        plain = value_and_grads(problem.to(torch.float32), "reference")
        ours = value_and_grads(problem.to(torch.float32), "native")
    for key, want in exact.items():
        assert_within_budget(ours[key], plain[key], want, name=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["parts_of_tiles", "replicate", "replicated_planes", "short_history", "wide", "groups"],
)
def test_half_precision_within_budget(name, dtype, isa_level) -> None:
    problem = _problem(name, dtype)
    exact = value_and_grads(problem.to(torch.float64), "reference")
    plain = value_and_grads(problem.to(dtype), "reference")
    ours = value_and_grads(problem.to(dtype), "native")
    for key, want in exact.items():
        assert_within_budget(ours[key], plain[key], want, name=key)


def _forward(problem: Problem) -> Tensor:
    with torch.no_grad():
        return problem.run("native")


def test_the_switch_follows_torch() -> None:
    problem = _problem("wide")
    default = _forward(problem)
    with fp32_precision("ieee"):
        strict = _forward(problem)
    assert not torch.equal(default, strict)
    # Asked for in words, "highest" holds for convolutions, too; a setting of their own goes first.
    with fp32_precision("none", matmuls="ieee"):
        assert_equal(_forward(problem), strict)
    with fp32_precision("tf32", matmuls="ieee"):
        assert_equal(_forward(problem), default)
    half = problem.to(torch.bfloat16)
    with fp32_precision("ieee"):  # float32 only: sums of bfloat16 are exact enough either way
        assert_equal(_forward(half), _forward(problem.to(torch.bfloat16)))


@pytest.mark.parametrize(
    "name",
    [
        "replicated_planes",
        "reflected_planes",
        "replicated_on_two_sides",
        "groups_of_replicated_planes",
    ],
)
def test_input_gradients_of_copied_borders_go_by_winograd(name) -> None:
    problem = _problem(name)
    default = value_and_grads(problem.to(torch.float32), "native")["dx"]
    with fp32_precision("ieee"):
        strict = value_and_grads(problem.to(torch.float32), "native")["dx"]
    inner = (slice(None),) * 3 + (slice(4, -4),) * 2  # far from the border, whose lines are direct
    assert not torch.equal(default[inner], strict[inner])


@pytest.mark.parametrize("precision", ["none", "ieee"])
@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    # the second: several chains of channels, and a last frame whose sum takes products of three sets
    [
        ([32, 80], 1, [6, 30, 34]),
        ([96, 96], 1, [6, 30, 34]),
        ([160, 200], 1, [5, 8, 8]),
        ([72, 520], 1, [37, 5, 9]),  # panels with two threads, several segments of frames
        ([96, 48], 3, [23, 10, 14]),
    ],
)
def test_results_do_not_depend_on_threads(channels, groups, size, precision) -> None:
    # 1 and 2 threads take groups of tiles apart, 24 share them; wide layers are always shared. Of
    # groups of few channels, a thread may take several, with weights of its own for each.
    problem = {"channels": channels, "size": size, "groups": groups}
    problem = make(problem, torch.float32, batch=1)
    before = torch.get_num_threads()
    results = []
    try:
        with fp32_precision(precision):
            for threads in (1, 2, 24):
                torch.set_num_threads(threads)
                results.append(_forward(problem))
    finally:
        torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("name", ["slices", "slices_of_time", "wide", "groups"])
def test_weight_gradients_do_not_depend_on_threads(name, isa_level) -> None:
    # Slices are shared out whole; 24 threads are more than slices and take ranges of channels and
    # columns of them, as two already do in the wide layer.
    problem = _problem(name)
    problem.weight.requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 24):
            torch.set_num_threads(threads)
            y = problem.run("native")
            results.append(torch.autograd.grad(y, problem.weight, torch.cos(y.detach()))[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("chunks", [(1, 4, 4), (2, 7), (5, 1, 3)])
def test_chunks_with_history_equal_the_whole_but_for_rounding(chunks, mode) -> None:
    x, weight = torch.randn(1, 24, 9, 8, 8), torch.randn(32, 24, 3, 3, 3) / 25
    options = {"time_mode": mode, "impl": "native"}
    exact = ops.causal_conv3d(x.double(), weight.double(), time_mode=mode, impl="reference")
    parts, start = [], 0
    for frames in chunks:
        history = x[:, :, :start] if start else None
        part = x[:, :, start : start + frames]
        parts.append(ops.causal_conv3d(part, weight, history=history, **options))
        start += frames
    assert _error(torch.cat(parts, 2), exact) < RELATIVE
    assert _error(ops.causal_conv3d(x, weight, **options), exact) < RELATIVE


def test_no_output_sees_a_later_frame() -> None:
    # Products are shared between four frames, so a later frame may round an earlier result
    # differently, but must not move it.
    x, weight = torch.randn(1, 16, 9, 8, 8), torch.randn(16, 16, 3, 3, 3) / 20
    exact = ops.causal_conv3d(x.double(), weight.double(), impl="reference")
    for t in range(1, 9):
        changed = x.clone()
        changed[:, :, t:] = torch.randn_like(changed[:, :, t:])
        y = ops.causal_conv3d(changed, weight, impl="native")
        assert float((y[:, :, :t] - exact[:, :, :t]).abs().max()) < 1e-5 * float(exact.abs().max())
