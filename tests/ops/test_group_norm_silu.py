"""group_norm_silu: values and gradients within budget at every instruction set, layouts, doors."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from torch import Tensor

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERANDS = ("x", "weight", "bias", "scale", "shift")


def _operands(problem: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    b, c, t, h, w = problem["size"]
    layout = torch.contiguous_format if problem.get("contiguous") else torch.channels_last_3d
    found = {"x": (torch.randn(b, c, t, h, w) * 2 + 3).to(dtype).contiguous(memory_format=layout)}
    found |= {name: torch.randn(c).to(dtype) for name in ("weight", "bias")}
    if "cell" in problem:
        ft, fh, fw = problem["cell"]
        found["scale"] = torch.randn(b, c, -(-t // ft), h // fh, w // fw).to(dtype)
        found["shift"] = torch.randn(b, 1, 1, h // fh, 1).to(dtype)
    return found


def _options(problem: dict[str, Any]) -> dict[str, Any]:
    return {
        "per_frame": not problem.get("clip"),
        "factor": tuple(problem.get("cell", (1, 1, 1))),
        "activation": None if problem.get("activation") == "none" else "silu",
    }


def _run(
    operands: dict[str, Tensor], groups: int, impl: str, options: dict[str, Any], dy: Tensor
) -> list[Tensor]:
    """The result and the gradients of all operands."""
    leaves = {k: v.detach().requires_grad_() for k, v in operands.items()}
    y = mf.group_norm_silu(num_groups=groups, impl=impl, **leaves, **options)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]


def check_against_float64(problem: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    operands = {k: v.to(device) for k, v in _operands(problem, dtype).items()}
    dy = torch.randn(problem["size"], device=device).to(dtype)
    wide = {k: v.double() for k, v in operands.items()}
    options, groups = _options(problem), problem["groups"]
    native = _run(operands, groups, "native", options, dy)
    plain = _run(operands, groups, "reference", options, dy)
    exact = _run(wide, groups, "reference", options, dy)
    names = ["y", *(f"gradient of {k}" for k in operands)]
    for name, *values in zip(names, native, plain, exact, strict=True):
        assert_within_budget(*values, name=name)
    assert native[0].stride() == operands["x"].stride()


@pytest.mark.parametrize("problem", problems("group_norm_silu", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(problem: dict[str, Any], dtype: torch.dtype, isa_level: str) -> None:
    check_against_float64(problem, dtype, "cpu")


LAYOUTS = [torch.channels_last_3d, torch.contiguous_format]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_means_cost_no_digits(
    mean: float, per_frame: bool, layout: torch.memory_format, isa_level: str
) -> None:
    """A variance from E[x^2] - E[x]^2, or from a rounded mean, fails here by orders."""
    x = (torch.randn(1, 20, 2, 9, 11) + mean).contiguous(memory_format=layout)
    dy = torch.randn_like(x)
    options = {"per_frame": per_frame}
    native = _run({"x": x}, 4, "native", options, dy)
    exact = _run({"x": x.double()}, 4, "reference", options, dy)
    for value, expected in zip(native, exact, strict=True):
        error = (value - expected).detach().abs().max()
        assert float(error) < 5e-6 * float(expected.detach().abs().max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_outlier_where_sums_begin_costs_no_digits(
    layout: torch.memory_format, isa_level: str
) -> None:
    x = torch.randn(1, 16, 1, 32, 32)
    x[:, :, :, 0, 0] = 1e4
    x = x.contiguous(memory_format=layout)
    y = mf.group_norm_silu(x, 4, activation=None, impl="native")
    exact = mf.group_norm_silu(x.double(), 4, activation=None)
    plain = mf.group_norm_silu(x, 4, activation=None, impl="reference")
    assert_within_budget(y, plain, exact)


def test_constant_frames_and_far_values(isa_level: str) -> None:
    x = torch.full((1, 8, 2, 3, 5), 7.25)
    bias = torch.tensor([-200.0, -90, -1, 0, 1, 90, 200, 3])
    y = mf.group_norm_silu(x, 2, None, bias, impl="native")
    expected = (bias * bias.sigmoid()).view(1, 8, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-30)
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(mf.group_norm_silu(x, 2, None, bias, impl="native").sum(), x)
    assert bool(dx.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_frame_stays_alone(value: float, isa_level: str) -> None:
    x = torch.randn(1, 8, 3, 4, 4)
    healthy = mf.group_norm_silu(x, 2, impl="native")
    x[0, 1, 1, 2, 2] = value
    y = mf.group_norm_silu(x, 2, impl="native")
    assert bool(y[:, :4, 1].isnan().all())
    assert_equal(y[:, :, ::2], healthy[:, :, ::2])
    assert_equal(y[:, 4:], healthy[:, 4:])


@pytest.mark.parametrize("per_frame", [True, False])
def test_threads_change_nothing(per_frame: bool) -> None:
    problem = next(p for p in problems("group_norm_silu", "test") if "two_threads" in p["name"])
    operands, dy = _operands(problem, torch.float32), torch.randn(problem["size"])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(_run(operands, 8, "native", {"per_frame": per_frame}, dy))
    torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_equal(a, b)


@given(
    frames=st.integers(1, 5),
    factor=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    cells=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_coarse_maps_equal_repeated_ones(
    frames: int, factor: tuple[int, int, int], cells: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, w = cells[0] * factor[1], cells[1] * factor[2]
    slots = -(-frames // factor[0])
    x = torch.randn(2, 6, frames, h, w, generator=generator)
    coarse = torch.randn(2, 6, slots, *cells, generator=generator)
    fine = coarse
    for axis in range(3):
        fine = fine.repeat_interleave(factor[axis], 2 + axis)
    fine = fine[:, :, -frames:]
    y = mf.group_norm_silu(x, 2, scale=coarse, shift=-coarse, factor=factor, impl="native")
    assert_equal(y, mf.group_norm_silu(x, 2, scale=fine, shift=-fine, impl="native"))
    reference = mf.group_norm_silu(x, 2, scale=fine, shift=-fine, impl="reference")
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [5, 4, 1])
def test_maps_broadcast(dim: int) -> None:
    x = torch.randn(2, 6, 3, 4, 5)
    shape = {5: (1, 6, 3, 1, 5), 4: (6, 1, 1, 1), 1: (5,)}[dim]
    scale = torch.randn(shape, requires_grad=True)
    dy = torch.randn_like(x)
    grads = []
    for impl in ("native", "reference"):
        y = mf.group_norm_silu(x, 3, scale=scale, impl=impl)
        grads.append((y, *torch.autograd.grad(y, scale, dy)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_second_derivatives() -> None:
    """A gradient penalty: the gradient of a gradient, against float64."""

    def penalty_grads(dtype: torch.dtype, impl: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, 8, 2, 3, 4, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(8, generator=generator).to(dtype).requires_grad_()
        scale = torch.randn(1, 8, 1, 3, 4, generator=generator).to(dtype).requires_grad_()
        y = mf.group_norm_silu(x, 2, weight, scale=scale, impl=impl)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), (x, weight, scale)))

    exact = penalty_grads(torch.float64, "reference")
    kernels, plain = (penalty_grads(torch.float32, impl) for impl in ("native", "reference"))
    for name, *values in zip(("x", "weight", "scale"), kernels, plain, exact, strict=True):
        assert_within_budget(*values, name=name)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_operands_that_depend_on_each_other(impl: str) -> None:
    """A gradient to be differentiated again is the same gradient: nothing is counted twice."""
    leaf, weight = torch.randn(1, 8, 2, 3, 4, requires_grad=True), torch.randn(8)
    weight.requires_grad_()
    calls: list[dict[str, Tensor]] = [
        {"scale": 0.1 * leaf, "shift": torch.sin(leaf)},
        {"scale": leaf, "shift": leaf},
        {"scale": leaf, "weight": weight, "bias": weight},
    ]
    for options in calls:
        y = mf.group_norm_silu(leaf, 2, **options, impl=impl)
        dy = torch.randn_like(y)
        plain = torch.autograd.grad(y, (leaf, weight), dy, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(y, (leaf, weight), dy, create_graph=True, allow_unused=True)
        for value, expected in zip(again, plain, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_any_strides() -> None:
    x, dy = torch.randn(2, 8, 3, 4, 5, requires_grad=True), torch.randn(2, 8, 3, 4, 5)
    _, dense = torch.ops.magvit_fast.group_norm_silu(
        x.detach(), None, None, None, None, 1e-6, [1, 1, 1], 2, True, True
    )
    results = []
    for stats in (dense, dense.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        y = mf.group_norm_silu(x, 2, statistics=stats, impl="native")
        results.append((y, *torch.autograd.grad(y, x, dy)))
    for value, expected in zip(*results, strict=True):
        assert_equal(value, expected)


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(1, 4, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.randn(1, 4, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        options: dict[str, Any] = {"eps": 1e-2, "factor": 2, "scale": scale, "shift": scale}
        return mf.group_norm_silu(x, 2, weight, bias, **options)

    assert torch.autograd.gradcheck(f, (x, weight, bias, scale), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, scale), fast_mode=True)


def test_only_what_is_needed_is_kept() -> None:
    """The backward keeps x and three numbers a group, nothing of the size of the result."""
    x = torch.randn(1, 32, 2, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        mf.group_norm_silu(x, 8, impl="native")
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr()}


def test_float64_goes_through_the_reference() -> None:
    x = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    assert mf.group_norm_silu(x, 2).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="float64"):
        mf.group_norm_silu(x, 2, impl="native")


def test_zero_size_and_gradients_of_it() -> None:
    x = torch.empty(0, 4, 2, 3, 3, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    y = mf.group_norm_silu(x, 2, weight, impl="native")
    assert y.shape == x.shape
    y.sum().backward()
    assert weight.grad is not None
    assert_equal(weight.grad, torch.zeros(4))


def test_opcheck() -> None:
    op = torch.ops.magvit_fast.group_norm_silu.default
    settings = ([1, 1, 1], 2, True, True)
    weight = torch.randn(4)
    last = torch.randn(2, 4, 3, 2, 5).contiguous(memory_format=torch.channels_last_3d)
    for x in (torch.randn(2, 4, 3, 2, 5), last, torch.empty(0, 4, 3, 2, 5)):
        torch.library.opcheck(op, (x, weight, None, None, None, 1e-6, *settings))
        scale = torch.randn(1, 4, 1, 2, 1)
        torch.library.opcheck(op, (x, None, None, scale, None, 1e-6, *settings))
        _, stats = op(x, weight, None, scale, None, 1e-6, *settings)
        backward = torch.ops.magvit_fast.group_norm_silu_backward.default
        torch.library.opcheck(
            backward, (torch.randn_like(x), stats, x, weight, None, scale, None, *settings)
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_its_gradient(dynamic: bool) -> None:
    def f(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return mf.group_norm_silu(x, 2, weight, scale=scale, factor=(1, 2, 2)) * 2

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for frames in (3, 2):
        x = torch.randn(1, 8, frames, 4, 6).contiguous(memory_format=torch.channels_last_3d)
        leaves = [x, torch.randn(8), torch.randn(1, 8, frames, 2, 3)]
        leaves = [v.requires_grad_() for v in leaves]
        expected, actual = f(*leaves), compiled(*leaves)
        assert_equal(actual, expected)
        grads = torch.autograd.grad(expected.sin().sum(), leaves)
        for a, e in zip(torch.autograd.grad(actual.sin().sum(), leaves), grads, strict=True):
            torch.testing.assert_close(a, e)


def test_float32_parameters_of_half_precision_input() -> None:
    x, weight = torch.randn(1, 4, 2, 3, 3).bfloat16(), torch.randn(4, requires_grad=True)
    y = mf.group_norm_silu(x, 2, weight, impl="native")
    assert y.dtype == torch.bfloat16
    (dweight,) = torch.autograd.grad(y.float().sum(), weight)
    assert dweight.dtype == torch.float32


def test_large_results_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    core = _native.core()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            if name == "advise_huge_pages":
                return lambda address, size: asked.append(size)
            return getattr(core, name)

    monkeypatch.setattr(_native, "_cpu_core", Watched())
    mf.group_norm_silu(torch.randn(1, 64, 1, 64, 64), 2, impl="native")
    assert not asked
    monkeypatch.setattr(_native, "HUGE_PAGES_FROM", 1 << 20)
    mf.group_norm_silu(torch.randn(1, 64, 1, 64, 64), 2, impl="native")
    assert asked == [1 << 20]


def test_bad_input() -> None:
    x = torch.randn(1, 8, 3, 4, 6)
    with pytest.raises(ValueError, match=r"scale: expected a shape broadcastable to x's .* \(2, 2"):
        mf.group_norm_silu(x, 2, scale=torch.randn(1, 8, 3, 2, 3), factor=2)
    with pytest.raises(ValueError, match=r"shift: expected a shape broadcastable"):
        mf.group_norm_silu(x, 2, shift=torch.randn(1, 8, 3, 4, 2), factor=(1, 1, 4))
    with pytest.raises(ValueError, match=r"factor: expected"):
        mf.group_norm_silu(x, 2, factor=0)


@pytest.mark.parametrize("cell", [1, 2])
def test_gradients_of_channels_last_maps_are_channels_last(cell: int) -> None:
    """As the layer that makes scale and shift wants them, and without a copy in either layout."""
    last = torch.channels_last_3d
    x = torch.randn(1, 8, 4, 6, 6).contiguous(memory_format=last)
    maps = [torch.randn(1, 8, 4 // cell, 6, 6).contiguous(memory_format=last) for _ in range(2)]
    leaves = [v.requires_grad_() for v in maps]
    y = mf.group_norm_silu(x, 2, scale=maps[0], shift=maps[1], factor=(cell, 1, 1), impl="native")
    dy = torch.randn_like(y)
    with torch.profiler.profile(record_shapes=True) as profile:
        grads = torch.autograd.grad(y, leaves, dy)
    assert all(g.is_contiguous(memory_format=last) for g in grads)
    assert grads[0].untyped_storage().data_ptr() != grads[1].untyped_storage().data_ptr()
    clones = [e.input_shapes[0] for e in profile.events() or () if e.name == "aten::clone"]
    assert [shape for shape in clones if len(shape) == 5] == []
