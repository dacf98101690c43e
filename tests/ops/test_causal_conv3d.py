"""causal_conv3d: values and gradients within the error budget, at every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tests.goldens import load_goldens
from tests.ops.conv_problems import PROBLEMS, Problem, fp32_precision, make, value_and_grads
from torch import Tensor

from magvit_fast import _native, ops
from magvit_fast.testing.budgets import assert_equal, assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GOLDENS = "magvit_v2/causal_conv"


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """test_causal_conv3d_winograd.py holds the default setting."""
    with fp32_precision("ieee"):
        yield


def _check(problem: Problem, dtype: torch.dtype) -> None:
    exact = value_and_grads(problem.to(torch.float64), "reference")
    plain = value_and_grads(problem.to(dtype), "reference")
    ours = value_and_grads(problem.to(dtype), "native")
    for name in exact:
        assert_within_budget(ours[name], plain[name], exact[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p["name"])
def test_values_and_gradients(problem, dtype, isa_level) -> None:
    if problem["name"].startswith("demo") and dtype == torch.float16:
        pytest.skip("the large problem in two dtypes is enough")
    _check(make(problem, dtype), dtype)


# --- goldens: exactly representable, so equal in any order of summation -------------------------------
CASES = [str(name) for name in load_goldens(GOLDENS)["cases"]]


def _golden(case: str, name: str) -> Tensor | None:
    arrays = load_goldens(GOLDENS)
    key = f"{case}/{name}"
    return torch.from_numpy(arrays[key]).float() if key in arrays else None


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("case", CASES)
def test_goldens_are_met_to_the_bit(case, isa_level) -> None:
    x = _channels_first(_golden(case, "x")).requires_grad_()
    weight = _golden(case, "param/w").permute(4, 3, 0, 1, 2).requires_grad_()
    bias = _golden(case, "param/b")
    numbers = [int(n) for n in load_goldens(GOLDENS)[f"{case}/kernel_stride"]]
    pads = load_goldens(GOLDENS)[f"{case}/pads"][1:4].flatten().tolist()
    y = ops.causal_conv3d(
        x, weight, bias, stride=tuple(numbers[3:]), padding=pads, time_mode="replicate",
        space_mode="replicate", impl="native",
    )  # fmt: skip
    dx, dweight = torch.autograd.grad(y, (x, weight), _channels_first(_golden(case, "dy")))
    assert_equal(y, _channels_first(_golden(case, "y")), name="y")
    assert_equal(dx, _channels_first(_golden(case, "dx")), name="dx")
    assert_equal(dweight, _golden(case, "dw").permute(4, 3, 0, 1, 2), name="dweight")
    # The default padding is that of the goldens.
    again = ops.causal_conv3d(
        x, weight, bias, stride=tuple(numbers[3:]), time_mode="replicate", space_mode="replicate",
        impl="native",
    )  # fmt: skip
    assert_equal(again, y, name="default padding")


# --- properties ---------------------------------------------------------------------------------------
@st.composite
def problems(draw: st.DrawFn) -> dict:
    modes = st.sampled_from(["zeros", "replicate", "reflect"])
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = [draw(st.integers(1, 4)) for _ in range(3)]
    size = [draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 14))]
    six = st.lists(st.integers(0, 3), min_size=6, max_size=6)
    return {
        "channels": [groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 18))],
        "size": size,
        "kernel": kernel,
        "stride": [draw(st.integers(1, 3)) for _ in range(3)],
        "dilation": [draw(st.integers(1, 2)) for _ in range(3)],
        "groups": groups,
        "padding": draw(st.none() | six),
        "history": draw(st.integers(0, 4)),
        "time_mode": draw(modes),
        "space_mode": draw(modes),
    }


@hypothesis.given(problems(), st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=40)
def test_any_geometry(problem, dtype) -> None:
    torch.manual_seed(0)
    made = make(problem, dtype)
    fits = True
    try:
        made.run("reference")
    except ValueError:
        fits = False
    if fits:
        _check(made, dtype)
    else:
        with pytest.raises(ValueError, match=r"padding: reflection|fewer than the"):
            made.run("native")


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 3), (3, 3, 3)])
def test_weights_in_several_pieces(kernel, isa_level) -> None:
    """Taps of more weights than fit the L2 cache at once, over rows of several tiles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 3, 5, 33, generator=generator)
    weight = torch.randn(128, 128, *kernel, generator=generator) * 0.03
    how = {"stride": (1, 2, 2), "padding": [0] * 6}
    actual = ops.causal_conv3d(x, weight, impl="native", **how)
    expected = ops.causal_conv3d(x.double(), weight.double(), impl="reference", **how)
    assert float((actual - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_no_output_sees_a_later_frame(mode) -> None:
    x, weight = torch.randn(1, 8, 6, 5, 5), torch.randn(12, 8, 3, 3, 3)
    whole = ops.causal_conv3d(x, weight, time_mode=mode, impl="native")
    for t in range(6):
        changed = x.clone()
        changed[:, :, t] += 1.0
        y = ops.causal_conv3d(changed, weight, time_mode=mode, impl="native")
        assert_equal(y[:, :, :t], whole[:, :, :t])
        assert not torch.equal(y[:, :, t], whole[:, :, t])


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1, 1), (3, 1, 3), (2, 5)])
def test_chunks_with_history_equal_the_whole(chunks, mode) -> None:
    x, weight = torch.randn(2, 5, 7, 4, 6), torch.randn(9, 5, 4, 3, 3)
    options = {"time_mode": mode, "space_mode": "replicate", "impl": "native"}
    whole = ops.causal_conv3d(x, weight, **options)
    parts, start = [], 0
    for frames in chunks:
        part = x[:, :, start : start + frames]
        # Replication repeats the first frame of all: the first chunks must hand it on themselves.
        history = x[:, :, :start] if start else None
        parts.append(ops.causal_conv3d(part, weight, history=history, **options))
        start += frames
    assert_equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize(
    "shape",
    [
        {"channels": [33, 70], "size": [3, 9, 11]},
        {"channels": [3, 16], "size": [5, 16, 64]},  # sums of slices: all sizes give several
        {"channels": [16, 3], "size": [5, 16, 64]},
        {"channels": [40, 64], "size": [3, 9, 11], "stride": [2, 2, 2]},  # and several items
        {"channels": [20, 35], "size": [3, 24, 40], "kernel": [1, 1, 1]},
        {"channels": [37, 37], "size": [3, 11, 13], "groups": 37},
        {"channels": [24, 24], "size": [3, 11, 13], "groups": 6},
    ],
    ids=lambda s: f"{s['channels']}",
)
def test_results_do_not_depend_on_threads(shape, isa_level) -> None:
    problem = make(shape, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 20):
            torch.set_num_threads(threads)
            results.append(value_and_grads(problem.to(torch.float32), "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            if name != "dbias":  # torch's own sum
                assert_equal(other[name], value, name=name)


# --- second derivatives -------------------------------------------------------------------------------
def _penalty_grads(problem: Problem, impl: str) -> list[Tensor]:
    """Gradients of |d(sum of sin y)/dx|^2 and friends: every second derivative takes part."""
    y = problem.run(impl)
    firsts = torch.autograd.grad(torch.sin(y.float() if y.dtype != torch.float64 else y).sum(),
                                 problem.tensors(), create_graph=True)  # fmt: skip
    penalty = sum(g.double().square().mean() for g in firsts)
    return list(torch.autograd.grad(penalty, problem.tensors()))


@pytest.mark.parametrize("name", ["replicate_strided", "dilated_grouped", "short_history"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives(name, dtype) -> None:
    problem = make(next(p for p in PROBLEMS if p["name"] == name), dtype)
    exact = _penalty_grads(problem.to(torch.float64), "reference")
    plain = _penalty_grads(problem.to(dtype), "reference")
    for ours, like, right in zip(
        _penalty_grads(problem.to(dtype), "native"), plain, exact, strict=True
    ):
        assert_within_budget(ours, like, right)


def test_reference_gradients_to_second_order() -> None:
    problem = make(
        {"channels": [2, 2], "size": [2, 2, 3], "kernel": [2, 2, 2], "stride": [1, 2, 1],
         "history": 1, "time_mode": "replicate", "space_mode": "replicate"},
        torch.float64, batch=1,
    ).to(torch.float64)  # fmt: skip

    def run(*tensors: Tensor) -> Tensor:
        x, weight, bias, history = tensors
        return Problem(x, weight, bias, history, problem.options).run("reference")

    assert torch.autograd.gradcheck(run, problem.tensors())
    assert torch.autograd.gradgradcheck(run, problem.tensors())


# --- inputs of every kind -----------------------------------------------------------------------------
STRIDED = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "frames_sliced": lambda x: torch.cat([x, x], 2)[:, :, ::2],
    "columns_sliced": lambda x: torch.cat([x, x], 4)[..., : x.shape[4]],
    "channels_last_sliced": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last_3d
    )[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(3, 4),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1, -1),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strides_of_any_kind(kind) -> None:
    x = STRIDED[kind](torch.randn(2, 6, 4, 5, 5))
    weight = torch.randn(3, 3, 3, 3, 7).permute(4, 3, 0, 1, 2)[:, :3].repeat(1, 2, 1, 1, 1)
    y = ops.causal_conv3d(x, weight, history=x, impl="native")
    plain = ops.causal_conv3d(x, weight, history=x, impl="reference")
    exact = ops.causal_conv3d(x.double(), weight.double(), history=x.double(), impl="reference")
    assert_within_budget(y, plain, exact)


@pytest.mark.parametrize("size", [[3, 5, 5], [3, 16, 16]], ids=["direct", "winograd"])
def test_a_bias_of_any_strides(size) -> None:
    x, weight = torch.randn(1, 16, *size), torch.randn(24, 16, 3, 3, 3) / 20
    for bias in (torch.randn(24, 2)[:, 0], torch.randn(1).expand(24), torch.randn(48)[1::2]):
        y = ops.causal_conv3d(x, weight, bias, impl="native")
        assert_equal(y, ops.causal_conv3d(x, weight, bias.clone().contiguous(), impl="native"))


def test_memory_format_of_the_result() -> None:
    x, weight = torch.randn(2, 6, 3, 5, 5, requires_grad=True), torch.randn(8, 6, 3, 3, 3)
    assert ops.causal_conv3d(x, weight, impl="native").is_contiguous()
    last = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = ops.causal_conv3d(last, weight, impl="native")
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    (dx,) = torch.autograd.grad(y.sum(), last)
    assert dx.is_contiguous(memory_format=torch.channels_last_3d)
    assert_equal(y, ops.causal_conv3d(x, weight, impl="native"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_size_batch(dtype) -> None:
    problem = make({"channels": [3, 4], "size": [2, 4, 4], "history": 1}, dtype, batch=0).to(dtype)
    results = value_and_grads(problem, "native")
    assert results["y"].shape == (0, 4, 2, 4, 4)
    assert results["dx"].shape == problem.x.shape
    assert not results["dweight"].any()
    assert results["dweight"].shape == problem.weight.shape


def test_values_that_are_not_finite_stay_where_they_belong(isa_level) -> None:
    for (
        dtype
    ) in DTYPES:  # an odd channel count: kernels that pair channels must not meet a neighbor
        x = torch.ones(1, 3, 1, 1, 9, dtype=dtype)
        x[..., 8] = float("inf")
        weight = torch.ones(5, 3, 1, 1, 3, dtype=dtype)
        y = ops.causal_conv3d(x, weight, impl="native")
        assert torch.equal(y[0, 0, 0, 0, :7], torch.tensor([6.0, *[9.0] * 6], dtype=dtype))
        assert bool(y[..., 7:].isinf().all())


def test_float64_takes_the_reference() -> None:
    x, weight = torch.randn(1, 2, 3, 4, 4).double(), torch.randn(3, 2, 3, 3, 3).double()
    assert ops.causal_conv3d(x, weight).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="float64"):
        ops.causal_conv3d(x, weight, impl="native")


def test_log_line_before_the_launch(monkeypatch, capsys) -> None:
    monkeypatch.setattr(_native, "LOG", True)
    ops.causal_conv3d(torch.randn(1, 2, 3, 4, 4), torch.randn(3, 2, 3, 3, 3), impl="native")
    printed = capsys.readouterr()
    assert "magvit_fast.causal_conv3d x=(1, 2, 3, 4, 4)" in printed.err
    assert not printed.out  # where commands print JSON


# --- under torch's other systems ----------------------------------------------------------------------
def _geometry() -> tuple:
    return [1, 2, 1], [1, 1, 1], 2, [2, 0, 1, 1, 1, 1], "replicate", "reflect"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_opcheck(layout) -> None:
    x, history = torch.randn(2, 4, 3, 5, 6).to(memory_format=layout), torch.randn(2, 4, 1, 5, 6)
    weight, bias = torch.randn(6, 2, 3, 3, 3), torch.randn(6)
    library = torch.ops.magvit_fast
    y = library.causal_conv3d(x, history, weight, bias, None, *_geometry())
    last = layout == torch.channels_last_3d
    for one in (bias, bias[:1].expand(6)):
        torch.library.opcheck(
            library.causal_conv3d.default, (x, history, weight, one, None, *_geometry())
        )
    torch.library.opcheck(
        library.causal_conv3d_input_grad.default, (y, weight, list(x.shape), 1, last, *_geometry())
    )
    torch.library.opcheck(
        library.causal_conv3d_weight_grad.default, (x, history, y, [3, 3, 3], *_geometry())
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic) -> None:
    torch._dynamo.reset()
    weight = torch.randn(6, 4, 3, 3, 3, requires_grad=True)

    def step(x: Tensor, history: Tensor | None) -> Tensor:
        y = ops.causal_conv3d(x, weight, stride=(1, 2, 2), history=history, time_mode="replicate")
        return y.sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for frames, history in ((3, None), (4, None), (4, torch.randn(2, 4, 1, 5, 6))):
        x = torch.randn(2, 4, frames, 5, 6, requires_grad=True)
        got = torch.autograd.grad(compiled(x, history), (x, weight))
        want = torch.autograd.grad(step(x, history), (x, weight))
        for a, b in zip(got, want, strict=True):
            assert_equal(a, b)


def test_padding_that_follows_the_size_compiles_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    weight = torch.randn(3, 2, 1, 3, 3)

    def pad_to_fours(x: Tensor) -> Tensor:
        return ops.causal_conv3d(x, weight, padding=[0, 0, 1, 1 + x.shape[3] % 4, 1, 1])

    compiled = torch.compile(pad_to_fours, fullgraph=True, backend="eager", dynamic=True)
    for height in (5, 6, 9):
        x = torch.randn(1, 2, 1, height, 4)
        assert_equal(compiled(x), pad_to_fours(x))


def test_autocast() -> None:
    x, weight = torch.randn(1, 4, 3, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.causal_conv3d(x, weight, history=x.detach(), impl="native")
    assert y.dtype == torch.bfloat16
    low = [t.bfloat16() for t in (x, weight)]
    assert_equal(y, ops.causal_conv3d(*low, history=low[0], impl="native"))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == torch.float32


def test_a_default_device_elsewhere_changes_nothing() -> None:
    x, weight = torch.randn(1, 16, 3, 8, 8, requires_grad=True), torch.randn(16, 16, 3, 3, 3)
    with torch.device("meta"):
        for _ in range(2):  # the second time packed weights are kept
            y = ops.causal_conv3d(x, weight, impl="native")
        (dx,) = torch.autograd.grad(y.sum(), x)
    again = ops.causal_conv3d(x, weight.clone(), impl="native")
    assert_equal(y, again)
    assert_equal(dx, torch.autograd.grad(again.sum(), x)[0])


def test_inference_mode() -> None:
    x, weight = torch.randn(1, 4, 3, 5, 5), torch.randn(6, 4, 3, 3, 3)
    with torch.inference_mode():
        y = ops.causal_conv3d(x, weight, impl="native")
    assert_equal(y.clone(), ops.causal_conv3d(x, weight, impl="native"))


# --- bad input ----------------------------------------------------------------------------------------
X, W = torch.zeros(2, 4, 3, 5, 5), torch.zeros(6, 4, 3, 3, 3)
BAD = {
    "x: expected a Tensor": (([1.0], W), {}, TypeError),
    "x: expected 5 dimensions": ((X[0], W), {}, ValueError),
    "x: expected a floating": ((X.long(), W.long()), {}, TypeError),
    "x: expected at least one frame": ((X[:, :, :0], W), {}, ValueError),
    "weight: expected 5 dimensions": ((X, W[0]), {}, ValueError),
    "weight: expected dtype": ((X, W.double()), {}, TypeError),
    "weight: expected device": ((X, W.to("meta")), {}, ValueError),
    r"weight: expected \[C_out, 4, KT, KH, KW\]": ((X, W[:, :2]), {}, ValueError),
    r"bias: expected \[6\]": ((X, W, torch.zeros(5)), {}, ValueError),
    "groups: expected a divisor": ((X, W), {"groups": 3}, ValueError),
    "stride: expected": ((X, W), {"stride": 0}, ValueError),
    "dilation: expected": ((X, W), {"dilation": (1, 1)}, ValueError),
    "padding: expected None or six": ((X, W), {"padding": (1, 1)}, ValueError),
    "padding: expected None or six ints >= 0": ((X, W), {"padding": (-1,) * 6}, ValueError),
    "padding: reflection in time": ((X[:, :, :2], W), {"time_mode": "reflect"}, ValueError),
    "padding: reflection in width": (
        (X[..., :1], W), {"space_mode": "reflect"}, ValueError),
    "x: height has 5 elements": ((X, W), {"padding": (6, 0, 0, 0, 0, 0), "dilation": 3}, ValueError),
    "time_mode: expected one of": ((X, W), {"time_mode": "edge"}, ValueError),
    "space_mode: expected one of": ((X, W), {"space_mode": 3}, ValueError),
    r"history: expected \[2, 4, Th, 5, 5\]": ((X, W), {"history": X[..., :4]}, ValueError),
    "history: expected dtype": ((X, W), {"history": X.double()}, TypeError),
    "impl: expected": ((X, W), {"impl": "fast"}, ValueError),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message) -> None:
    args, kwargs, kind = BAD[message]
    with pytest.raises(kind, match=message):
        ops.causal_conv3d(*args, **kwargs)
