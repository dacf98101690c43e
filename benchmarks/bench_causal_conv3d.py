"""causal_conv3d: forward, each gradient and all three ("training") against PyTorch's two layouts.

PyTorch pays for its own padding in the forward pass and in training (F.pad, as every implementation in
PyTorch does) and gets a single gradient of the padded tensor without undoing the padding, which is in
its favor. In training the weights change between steps, so nothing made of them lasts: every step of every
candidate begins with a write to one of them. The strict row asks for the form of float32 that is no less
exact than PyTorch's own (fp32_precision = "ieee").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import magvit_fast as mf

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.bench

PROBLEMS = [
    p
    for p in tomllib.loads((Path(__file__).parent / "problems" / "causal_conv3d.toml").read_text())[
        "problem"
    ]
    if p.get("bench")
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _change(w: Tensor) -> None:
    """What an optimizer does between two steps, as far as anything kept of `w` is concerned."""
    with torch.no_grad():
        w[0, 0, 0, 0, 0].mul_(1.0)


def _options(problem: dict) -> dict:
    return {k: problem[k] for k in ("stride", "dilation", "groups") if k in problem}


def _native(
    x: Tensor, w: Tensor, b: Tensor, dy: Tensor, p: dict, work: str
) -> Callable[[], object]:
    how = _options(p)
    if work == "forward":
        return lambda: mf.causal_conv3d(x, w, b, **how, impl="native")
    if work == "training":
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()

        def step() -> object:
            _change(w)
            return torch.autograd.grad(mf.causal_conv3d(x, w, b, **how, impl="native"), (x, w), dy)

        return step
    # Only the wanted gradient is asked for: a torch.autograd.Function cannot see that autograd.grad
    # will drop the other one, while PyTorch's own convolution can.
    wanted = (x if work == "input_grad" else w).detach().requires_grad_()
    x, w = (wanted, w) if work == "input_grad" else (x, wanted)
    y = mf.causal_conv3d(x, w, b, **how, impl="native")
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _torch(x: Tensor, w: Tensor, b: Tensor, dy: Tensor, p: dict, work: str) -> Callable[[], object]:
    how = _options(p)
    spans = zip(p.get("kernel", (3, 3, 3)), p.get("dilation", (1, 1, 1)), strict=True)
    t, h, v = (dilation * (kernel - 1) for kernel, dilation in spans)
    pads = [v // 2, v - v // 2, h // 2, h - h // 2, t, 0]
    inner = [0, pads[2], pads[0]]  # what the convolution itself can pad: equal on both sides
    if pads[0] == pads[1] and pads[2] == pads[3]:
        pads[:4] = [0, 0, 0, 0]
    else:
        inner = [0, 0, 0]
    if work == "forward":
        return lambda: F.conv3d(F.pad(x, pads), w, b, padding=inner, **how)
    if work == "training":
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()

        def step() -> object:
            _change(w)
            y = F.conv3d(F.pad(x, pads), w, b, padding=inner, **how)
            return torch.autograd.grad(y, (x, w), dy)

        return step
    padded = F.pad(x, pads).detach().requires_grad_()
    w = w.detach().requires_grad_()
    y = F.conv3d(padded, w, b, padding=inner, **how)
    wanted = padded if work == "input_grad" else w
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


IMPLS = ["native", "torch_contiguous", "torch_channels_last"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("work", ["forward", "input_grad", "weight_grad", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p["name"])
def test_causal_conv3d(benchmark, problem: dict, dtype: str, work: str, impl: str) -> None:
    _measure(
        benchmark, problem, dtype, work, impl, f"causal_conv3d {problem['name']} {dtype} {work}"
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_causal_conv3d_strict(benchmark, impl: str) -> None:
    problem = next(p for p in PROBLEMS if p["name"] == "res_128_17x64x64")
    group = f"causal_conv3d {problem['name']} float32 strict forward"
    switch = torch.backends.mkldnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        _measure(benchmark, {**problem, "target": {}}, "float32", "forward", impl, group)
    finally:
        switch.fp32_precision = before


def _measure(benchmark, problem: dict, dtype: str, work: str, impl: str, group: str) -> None:
    torch.manual_seed(0)
    (c_in, c_out), kernel = problem["channels"], problem.get("kernel", (3, 3, 3))
    x = torch.randn(1, c_in, *problem["size"]).to(DTYPES[dtype])
    w = torch.randn(c_out, c_in // problem.get("groups", 1), *kernel).to(DTYPES[dtype])
    b = torch.randn(c_out).to(DTYPES[dtype])
    if impl != "torch_contiguous":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if impl == "torch_channels_last":
        w = w.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        y = mf.causal_conv3d(x, w, b, **_options(problem))
    dy = torch.randn_like(y)
    run = (_native if impl == "native" else _torch)(x, w, b, dy, problem, work)
    benchmark.group = group
    benchmark.extra_info["impl"] = impl
    target = problem.get("target", {}).get(f"{dtype} {work}")
    if impl == "native" and target is not None:
        benchmark.extra_info["target"] = target
    benchmark(run)
