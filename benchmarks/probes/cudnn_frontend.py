"""Probe: which causal and fused 3D convolutions cuDNN's graphs build on this device, and how fast they run.

The framework's own convolution takes symmetric padding; the graph interface has pads of their own before and
behind. Prints one JSON: for each graph its milliseconds and its difference from F.conv3d, or why there is none.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, CHANNELS, SIZE = 8, 128, (17, 128, 128)
SAME, CAUSAL = ([1, 1, 1], [1, 1, 1]), ([2, 1, 1], [0, 1, 1])


def _milliseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times[2:]), 4)


class Problem:
    """One layer's tensors, channels last, and the graph around its convolution."""

    def __init__(self) -> None:
        layout = torch.channels_last_3d
        make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.x = make(BATCH, CHANNELS, *SIZE).contiguous(memory_format=layout)
        self.w = (make(CHANNELS, CHANNELS, 3, 3, 3) * (27 * CHANNELS) ** -0.5).contiguous(
            memory_format=layout
        )
        self.bias = make(1, CHANNELS, 1, 1, 1)
        self.residual = torch.randn_like(self.x)

    def expected(self, pads: tuple[list[int], list[int]], fused: bool) -> Tensor:
        before, behind = pads
        sides = [n for i in (2, 1, 0) for n in (before[i], behind[i])]
        y = F.conv3d(F.pad(self.x, sides), self.w)
        return F.silu(y + self.bias) + self.residual if fused else y

    def run(
        self, pads: tuple[list[int], list[int]], fused: bool, statistics_too: bool
    ) -> dict[str, Any]:
        import cudnn

        kind = cudnn.data_type
        handle = cudnn.create_handle()
        graph = cudnn.pygraph(
            io_data_type=kind.BFLOAT16, intermediate_data_type=kind.FLOAT,
            compute_data_type=kind.FLOAT, handle=handle,
        )  # fmt: skip
        inputs = {graph.tensor_like(t): t for t in (self.x, self.w)}
        x, w = inputs
        y = graph.conv_fprop(
            image=x, weight=w, pre_padding=pads[0], post_padding=pads[1], stride=[1, 1, 1],
            dilation=[1, 1, 1],
        )  # fmt: skip
        if fused:
            bias, residual = graph.tensor_like(self.bias), graph.tensor_like(self.residual)
            inputs |= {bias: self.bias, residual: self.residual}
            y = graph.add(a=graph.swish(input=graph.bias(input=y, bias=bias)), b=residual)
        y.set_output(True).set_data_type(kind.BFLOAT16)
        out = torch.empty_like(self.residual)
        bindings = {**inputs, y: out}
        if statistics_too:
            for sums in graph.genstats(input=y):
                sums.set_output(True).set_data_type(kind.FLOAT)
                bindings[sums] = torch.empty(1, CHANNELS, 1, 1, 1, device="cuda")
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        space = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)
        call = lambda: graph.execute(bindings, space, handle=handle)  # noqa: E731
        ms = _milliseconds(call)
        exact = self.expected(pads, fused).float()
        difference = (out.float() - exact).abs().max() / exact.abs().max()
        return {"ms": ms, "difference": float(difference)}


def _tried(problem: Problem, *graph: Any) -> dict[str, Any]:
    try:
        return problem.run(*graph)
    except Exception as error:  # what is asked is whether it builds
        return {"error": f"{type(error).__name__}: {error}"[:300]}


GRAPHS = {
    "padding 1 on both sides": (SAME, False, False),
    "causal padding": (CAUSAL, False, False),
    "causal padding, bias, swish, residual": (CAUSAL, True, False),
    "padding 1 on both sides, statistics": (SAME, False, True),
    "causal padding, statistics": (CAUSAL, False, True),
}


def main() -> None:
    found: dict[str, Any] = {}
    try:
        import cudnn
    except ImportError as error:
        print(json.dumps({"missing": f"nvidia-cudnn-frontend: {error}"}))
        return
    found["frontend"], found["backend"] = cudnn.__version__, cudnn.backend_version()
    problem = Problem()
    for name, graph in GRAPHS.items():
        found[name] = _tried(problem, *graph)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
