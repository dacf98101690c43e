"""What the GPU session measures: each row is one piece of work, our way and PyTorch's ways of doing it.

`ours` is None where there is no kernel yet: the row then fixes the bar. `informative` ways do less than
the row's work (a convolution that is handed an already padded tensor, say) and never count as the best.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_fused import joined_rows, norm_rows
from benchmarks.gpu_models import generation_row, tokenizer_rows
from benchmarks.gpu_row import CHANNELS_LAST, Compiled, Row

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PROBLEMS = Path(__file__).parent / "problems"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = "cuda"
FIRST_COMPILED = ("lfq training step n10240", "confidence_remask 8x", "factorized_embedding",
                  "group_norm_silu 128 17x128x128 b8", "causal_conv3d res_128_17", "causal_conv3d res_256_17",
                  "model: magvit-v2-base", "")  # fmt: skip


def _randn(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=dtype) * scale


# --- causal_conv3d ----------------------------------------------------------------------------
def conv_problems() -> Iterator[dict[str, Any]]:
    for path in (PROBLEMS / "gpu" / "causal_conv3d.toml", PROBLEMS / "causal_conv3d.toml"):
        on_gpu = path.parent.name == "gpu"
        for problem in tomllib.loads(path.read_text())["problem"]:
            plain = not {"groups", "dilation"} & problem.keys()
            if on_gpu or (problem.get("bench") and plain):
                yield {"batch": 1, "kernel": [3, 3, 3], "stride": [1, 1, 1],
                       "work": ["forward", "input_grad", "weight_grad"],
                       "dtypes": ["bfloat16"] if on_gpu else ["bfloat16", "float32"],
                       "with_bias": not on_gpu, **problem}  # fmt: skip


def _pads(p: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(what F.pad adds, what the convolution pads itself) for causal time and "same" space."""
    kt, kh, kw = p["kernel"]
    pads = [(kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2, kt - 1, 0]
    if pads[0] == pads[1] and pads[2] == pads[3]:
        return [0, 0, 0, 0, kt - 1, 0], [0, pads[2], pads[0]]
    return pads, [0, 0, 0]


def _padded(x: Tensor, pads: list[int]) -> Tensor:
    """F.pad with zeros that stays channels-last: one fill of the border and one copy."""
    left, right, top, bottom, front, _ = pads
    n, c, t, h, w = x.shape
    out = x.new_empty((n, c, t + front, h + top + bottom, w + left + right)).contiguous(
        memory_format=CHANNELS_LAST
    )
    out.zero_() if left + right + top + bottom else out[:, :, :front].zero_()
    out[:, :, front:, top : top + h, left : left + w] = x
    return out


def _conv_work(p: dict[str, Any], y_size: tuple[int, ...], itemsize: int) -> tuple[float, float]:
    """FLOPs without the taps that read zero padding in time, and bytes with each tensor once."""
    (c_in, c_out), (kt, kh, kw) = p["channels"], p["kernel"]
    frames = sum(
        sum(1 for k in range(kt) if 0 <= o * p["stride"][0] + k - (kt - 1) < p["size"][0])
        for o in range(y_size[0])
    )
    flops = 2.0 * p["batch"] * frames * y_size[1] * y_size[2] * kh * kw * c_in * c_out
    moved = p["batch"] * (c_in * _prod(p["size"]) + c_out * _prod(y_size))
    return flops, itemsize * float(moved + c_in * c_out * kt * kh * kw)


def _prod(values: Any) -> int:
    return functools.reduce(lambda a, b: a * b, values, 1)


def _conv_row(p: dict[str, Any], dtype_name: str, work: str) -> Row:
    import magvit_fast as mf

    dtype, stride, (c_in, c_out) = DTYPES[dtype_name], p["stride"], p["channels"]
    size, kernel = p["size"], p["kernel"]
    y_size = tuple((n + (k - 1) - k) // s + 1 for n, k, s in zip(size, kernel, stride, strict=True))
    pads, inner = _pads(p)
    flops, moved = _conv_work(p, y_size, 2 if dtype != torch.float32 else 4)
    scale = (c_in * _prod(kernel)) ** -0.5
    for_sm90a = ("weight_grad" if work == "weight_grad" else "gather",)
    if dtype != torch.bfloat16 or min(c_in, c_out) < 64:
        for_sm90a = ()
    row = Row(
        f"causal_conv3d {p['name']} {dtype_name} {work}", lambda: (), {}, None, {}, flops, moved
    )

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        x = _randn(p["batch"], c_in, *size, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
        w = _randn(c_out, c_in, *kernel, dtype=dtype, scale=scale)
        dy = _randn(p["batch"], c_out, *y_size, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
        return x, w, dy

    if work == "forward":

        def make() -> tuple[Any, ...]:
            x, w, _ = tensors()
            bias = torch.randn(c_out, device=DEVICE, dtype=dtype) if p["with_bias"] else None
            return x, w, w.contiguous(memory_format=CHANNELS_LAST), bias

        row.make, row.sm90a = make, for_sm90a
        row.ours = lambda x, w, wl, b: mf.causal_conv3d(x, w, b, stride=stride, impl="native")
        row.ways["pad, then conv (channels last)"] = lambda x, w, wl, b: F.conv3d(
            _padded(x, pads), wl, b, stride, inner
        )
        if p["batch"] == 8:
            row.compiled = lambda compiler: compiler(row.ways["pad, then conv (channels last)"])
        row.ways["F.pad, then conv"] = lambda x, w, wl, b: F.conv3d(
            F.pad(x, pads), wl, b, stride, inner
        )
        if pads[:4] == [0, 0, 0, 0] and stride[0] == 1 and pads[4]:
            both = [pads[4], *inner[1:]]
            row.ways["pad both ends, crop"] = lambda x, w, wl, b: F.conv3d(x, wl, b, stride, both)[
                :, :, : size[0]
            ]
            row.informative["bare conv, padded by 1 on both sides of time"] = lambda x, w, wl, b: (
                F.conv3d(x, wl, b, stride, [pads[4] // 2, *inner[1:]])
            )
        return row

    # Gradients of PyTorch are those of the padded tensor, made before the clock starts: in its favor.
    geometry = ([stride] * 3 if isinstance(stride, int) else stride, [1, 1, 1], 1,
                [pads[4], 0, pads[2] or inner[1], pads[3] or inner[1],
                 pads[0] or inner[2], pads[1] or inner[2]], "zeros", "zeros")  # fmt: skip
    masks = {"input_grad": [True, False, False], "weight_grad": [False, True, False]}[work]

    def make_gradient() -> tuple[Any, ...]:
        x, w, dy = tensors()
        return x, _padded(x, pads), w, w.contiguous(memory_format=CHANNELS_LAST), dy

    def theirs(x: Tensor, xp: Tensor, w: Tensor, wl: Tensor, dy: Tensor) -> Tensor:
        grads = torch.ops.aten.convolution_backward(
            dy, xp, wl, None, stride, inner, [1, 1, 1], False, [0, 0, 0], 1, masks
        )
        if work == "weight_grad":
            return grads[1]
        _, height, width = size
        return grads[0][:, :, pads[4] :, pads[2] : pads[2] + height, pads[0] : pads[0] + width]

    def ours(x: Tensor, xp: Tensor, w: Tensor, wl: Tensor, dy: Tensor) -> Tensor:
        if work == "weight_grad":
            return torch.ops.magvit_fast.causal_conv3d_weight_grad(x, None, dy, kernel, *geometry)
        return torch.ops.magvit_fast.causal_conv3d_input_grad(
            dy, w, list(x.shape), 0, True, *geometry
        )[0]

    row.make, row.ours, row.sm90a = make_gradient, ours, for_sm90a
    row.ways["convolution_backward (channels last)"] = theirs
    return row


# --- the small ops ----------------------------------------------------------------------------
def _lfq_rows(
    batches: tuple[int, ...] = (1, 8), grid: tuple[int, int, int] = (5, 16, 16)
) -> Iterator[Row]:
    import magvit_fast as mf

    for batch in batches:
        positions = batch * _prod(grid)

        def make(batch: int = batch) -> tuple[Any, ...]:
            return (_randn(batch, 18, *grid, dtype=torch.float32, scale=0.05),)

        size = positions * 18 * 4.0

        yield Row(f"lfq_quantize n{positions} d18", make, {"where and sum": _signs},
                  lambda z: mf.lfq_quantize(z, impl="native"), bytes=2 * size)  # fmt: skip

        def losses(z: Tensor, impl: str) -> tuple[Tensor, Tensor]:
            return mf.lfq_entropy(z, impl=impl)

        reference = functools.partial(losses, impl="reference")
        native = functools.partial(losses, impl="native")
        yield Row(
            f"lfq_entropy n{positions} d18 forward", make, {"factorized by halves": reference},
            native, flops=2.0 * positions * 2**18, compiled=_compiled_losses(reference, False),
        )  # fmt: skip
        yield Row(
            f"lfq_entropy n{positions} d18 forward and backward", make,
            {"factorized by halves": functools.partial(_entropy_gradient, reference)},
            functools.partial(_entropy_gradient, native),
            flops=6.0 * positions * 2**18, compiled=_compiled_losses(reference, True),
        )  # fmt: skip

        def step(z: Tensor, impl: str) -> Any:
            codes = mf.lfq_quantize(z, impl=impl) if impl == "native" else _signs(z)
            return _entropy_gradient(functools.partial(losses, impl=impl), z), codes

        def tf32_step(z: Tensor, impl: str) -> Any:
            with _tf32():
                return step(z, impl)

        def compiled_step(
            compiler: Callable[..., Any], reference: Callable[..., Any] = reference
        ) -> Callable[..., Any]:
            signs, values = compiler(_signs), compiler(reference)
            return lambda z: (_entropy_gradient(values, z), signs(z))

        for precision, run in (("", step), (" (TF32)", tf32_step)):
            yield Row(
                f"lfq training step n{positions} d18{precision}", make,
                {"signs, factorized by halves": functools.partial(run, impl="reference")},
                functools.partial(run, impl="native"), flops=6.0 * positions * 2**18,
                compiled=None if precision else compiled_step,
            )  # fmt: skip


def _signs(z: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized values and indices of z [N, D, ...], as a PyTorch user writes it."""
    positive = z > 0
    powers = (2 ** torch.arange(18, device=z.device)).view(1, 18, 1, 1, 1)
    return torch.where(positive, 1.0, -1.0), (positive * powers).sum(1)


def _entropy_gradient(losses: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    per_sample, codebook = losses(z)
    return torch.autograd.grad(per_sample - codebook, z)[0]


def _compiled_losses(losses: Callable[..., Any], backward: bool) -> Compiled:
    def make(compiler: Callable[..., Any]) -> Callable[..., Any]:
        compiled = compiler(losses)
        return functools.partial(_entropy_gradient, compiled) if backward else compiled

    return make


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """TF32 in float32 matrix products, by the same switch as `set_up`'s: torch refuses a mix of old and new ones."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _embedding_rows(batch: int = 8) -> Iterator[Row]:
    import magvit_fast as mf

    def bag(ids: Tensor, weight: Tensor) -> Tensor:
        groups, values, dim = weight.shape
        places = torch.arange(groups, device=ids.device)
        bits = values.bit_length() - 1
        rows = ((ids.unsqueeze(-1) >> bits * places) & (values - 1)) + values * places
        out = F.embedding_bag(rows.view(-1, groups), weight.view(-1, dim), mode="sum")
        return out.view(*ids.shape, dim)

    plain = functools.partial(mf.factorized_embedding, impl="reference")
    native = functools.partial(mf.factorized_embedding, impl="native")
    for backward in (False, True):

        def make() -> tuple[Any, ...]:
            weight = _randn(2, 512, 1024, dtype=torch.bfloat16)
            ids = torch.randint(2**18, (batch, 1280), device=DEVICE)
            return ids, weight, _randn(batch, 1280, 1024, dtype=torch.bfloat16)

        def run(
            ids: Tensor, weight: Tensor, grad: Tensor, backward: bool, lookup: Callable[..., Tensor]
        ) -> Any:
            weight = weight.detach().requires_grad_(backward)
            out = lookup(ids, weight)
            return torch.autograd.grad(out, weight, grad) if backward else out

        def compiled(compiler: Callable[..., Any], backward: bool = backward) -> Callable[..., Any]:
            return functools.partial(run, backward=backward, lookup=compiler(plain))

        yield Row(
            f"factorized_embedding {batch}x1280 2x512x1024 bfloat16 {'both passes' if backward else 'forward'}",
            make,
            {"sum of embeddings": functools.partial(run, backward=backward, lookup=plain),
             "embedding_bag": functools.partial(run, backward=backward, lookup=bag)},
            functools.partial(run, backward=backward, lookup=native),
            bytes=batch * 1280 * 1024 * 2.0 * (3 if backward else 1), compiled=compiled,
        )  # fmt: skip


def _torch_remask(logits: Tensor, tokens: Tensor, unknown: Tensor, count: Tensor) -> Any:
    """One step of masked decoding as a PyTorch user writes it, with torch's own random numbers."""
    x = logits.float()
    picks = (x - torch.empty_like(x).exponential_().log()).argmax(-1, keepdim=True)
    return _ranked(picks, x.log_softmax(-1).gather(-1, picks), tokens, unknown, count)


def _inverse_remask(logits: Tensor, tokens: Tensor, unknown: Tensor, count: Tensor) -> Any:
    """The same with one random number a row, found in the running sum of the probabilities."""
    p = logits.float().softmax(-1)
    through = p.cumsum(-1)
    share = torch.rand_like(through[..., :1]) * through[..., -1:]
    picks = torch.searchsorted(through, share, right=True).clamp_(max=logits.shape[-1] - 1)
    return _ranked(picks, p.gather(-1, picks).log(), tokens, unknown, count)


def _ranked(
    picks: Tensor, log_picked: Tensor, tokens: Tensor, unknown: Tensor, count: Tensor
) -> Any:
    """The picks as tokens, and the `count` least confident ones, which stay unknown."""
    log_prob = log_picked.squeeze(-1).sum(-1)
    confidence = log_prob - 4.5 * torch.empty_like(log_prob).exponential_().log()
    shifts = 9 * torch.arange(picks.shape[2], device=picks.device)
    new_tokens = torch.where(unknown, (picks.squeeze(-1) << shifts).sum(-1), tokens)
    rank = torch.where(unknown, confidence, torch.inf).argsort(-1).argsort(-1)
    return new_tokens, (rank < count.unsqueeze(1)) & unknown


def _remask_rows() -> Iterator[Row]:
    import magvit_fast as mf

    for batch in (1, 8):

        def make(batch: int = batch) -> tuple[Any, ...]:
            return (
                _randn(batch, 1280, 2, 512, dtype=torch.bfloat16),
                torch.randint(2**18, (batch, 1280), device=DEVICE),
                torch.rand(batch, 1280, device=DEVICE) < 0.8,
                torch.full((batch,), 640, device=DEVICE),
            )

        yield Row(
            f"confidence_remask {batch}x1280 2x512 bfloat16", make,
            {"softmax, Gumbel, argsort": _torch_remask,
             "softmax, cumsum, searchsorted": _inverse_remask},
            lambda logits, tokens, unknown, count: mf.confidence_remask(
                logits, tokens, unknown, num_unknown=count, choice_temperature=4.5, impl="native"
            ),
            bytes=batch * 1280 * 1024 * 2.0 * 0.8, compare=False,
            compiled=lambda compiler: compiler(_torch_remask),
        )  # fmt: skip


# --- the machine, and bars without a kernel of ours -------------------------------------------
def _machine_rows() -> Iterator[Row]:
    n = 8192
    yield Row(
        "machine: bfloat16 matrix product 8192",
        lambda: (_randn(n, n, dtype=torch.bfloat16), _randn(n, n, dtype=torch.bfloat16)),
        {"torch.matmul": torch.matmul}, flops=2.0 * n**3,
    )  # fmt: skip
    yield Row(
        "machine: copy of 4 GB",
        lambda: (torch.empty(2**31, dtype=torch.int8, device=DEVICE),
                 torch.empty(2**31, dtype=torch.int8, device=DEVICE)),
        {"copy_": lambda a, b: a.copy_(b)}, bytes=2.0**32,
    )  # fmt: skip


def set_up() -> None:
    """torch's switches while rows are measured."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def all_rows() -> list[Row]:
    """Most important first; a session that runs out of time leaves out the last ones."""
    conv = [
        _conv_row(p, dtype, work)
        for p in conv_problems()
        for dtype in p["dtypes"]
        for work in p["work"]
    ]
    layers = [r for r in conv if "_b8 " in r.name or "_b1 " in r.name]
    rest = [r for r in conv if r not in layers]
    small = [*_remask_rows(), *_lfq_rows(), *_embedding_rows()]
    models = [*tokenizer_rows(), generation_row()]
    norms = [*norm_rows()]
    first = [*_machine_rows(), *layers[:6], *joined_rows(), *norms[:6]]
    return [*first, *small, *models, *norms[6:], *layers[6:], *rest]


def compiled_rows(rows: list[Row]) -> list[Row]:
    """Those that torch.compile is asked for, in the order of FIRST_COMPILED."""
    compiled = [row for row in rows if row.compiled]
    return sorted(
        compiled,
        key=lambda row: next(i for i, p in enumerate(FIRST_COMPILED) if row.name.startswith(p)),
    )
