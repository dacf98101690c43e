"""Test problems of causal_conv3d: shapes from benchmarks/problems, tensors and the two ways to run them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magvit_fast import ops

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

FILE = Path(__file__).parents[2] / "benchmarks" / "problems" / "causal_conv3d.toml"
PROBLEMS = [p for p in tomllib.loads(FILE.read_text())["problem"] if p.get("test")]
OPTIONS = ("stride", "dilation", "groups", "padding", "time_mode", "space_mode")


@contextlib.contextmanager
def fp32_precision(convolutions: str, matmuls: str = "none") -> Iterator[None]:
    """torch's float32 settings inside the block: "ieee" is strict, "none" not said."""
    backend: Any = torch.backends.mkldnn
    before = backend.conv.fp32_precision, backend.matmul.fp32_precision
    backend.conv.fp32_precision, backend.matmul.fp32_precision = convolutions, matmuls
    try:
        yield
    finally:
        backend.conv.fp32_precision, backend.matmul.fp32_precision = before


@dataclasses.dataclass
class Problem:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    history: Tensor | None
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.history) if t is not None]

    def to(self, *args: Any, **kwargs: Any) -> Problem:
        """Fresh leaves that require grad."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(*args, **kwargs).clone().requires_grad_()

        return Problem(
            *(leaf(t) for t in (self.x, self.weight, self.bias, self.history)), self.options
        )

    def run(self, impl: str) -> Tensor:
        return ops.causal_conv3d(
            self.x, self.weight, self.bias, history=self.history, impl=impl, **self.options
        )


def make(problem: dict[str, Any], dtype: torch.dtype, batch: int = 2) -> Problem:
    """Random tensors already rounded to `dtype`, so that every way of computing sees the same numbers."""
    (c_in, c_out), groups = problem["channels"], problem.get("groups", 1)
    kernel = problem.get("kernel", [3, 3, 3])
    depth = c_in // groups * kernel[0] * kernel[1] * kernel[2]
    x = torch.randn(batch, c_in, *problem["size"])
    history = None
    if problem.get("history"):
        history = torch.randn(batch, c_in, problem["history"], *problem["size"][1:]).to(dtype)
    weight = torch.randn(c_out, c_in // groups, *kernel) / depth**0.5
    options = {k: problem[k] for k in OPTIONS if k in problem}
    return Problem(x.to(dtype), weight.to(dtype), torch.randn(c_out).to(dtype), history, options)


def value_and_grads(problem: Problem, impl: str, seed: int = 1) -> dict[str, Tensor]:
    """y and the gradients of a fixed weighted sum of y."""
    y = problem.run(impl)
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    names = ["dx", "dweight"] + ["dbias"] * (problem.bias is not None)
    names += ["dhistory"] * (problem.history is not None)
    grads = torch.autograd.grad(y, problem.tensors(), dy, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}
