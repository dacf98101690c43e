"""What training keeps between forward and backward: inputs of norms instead of their results.

A convolution needs its input again for the gradient of its weight. Where that input came out of a
group norm, the norm's own input is kept anyway, and norm and SiLU are computed once more from it: a
pass over memory beside a convolution, for half of the memory of a residual block.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from magvit_fast.nn.norm import GroupNormSiLU

# Inside a level that is recomputed whole, nothing of it may be kept: a recipe would hold its input.
_keep_plainly: contextvars.ContextVar[bool] = contextvars.ContextVar("keep_plainly", default=False)


class _Recipe:
    """Stands for norm(x) among the tensors kept for the backward."""

    def __init__(self, norm: GroupNormSiLU, x: Tensor, statistics: Tensor | None) -> None:
        self.norm, self.sources = norm, (x, norm.weight, norm.bias)
        self.statistics = statistics
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [t._version for t in self.sources]

    def cook(self) -> Tensor:
        if self._versions() != self.versions:
            raise RuntimeError(
                "a tensor that the backward needs was changed in place: the input or a parameter of "
                f"{type(self.norm).__name__} before a convolution"
            )
        with torch.no_grad():
            return self.norm(self.sources[0], self.statistics)  # type: ignore[no-any-return]


def norm_then(
    norm: GroupNormSiLU,
    layer: Callable[..., Tensor],
    x: Tensor,
    *more: Any,
    statistics: Tensor | None = None,
) -> Tensor:
    """layer(norm(x), *more), of which the backward keeps x where the layer would keep norm(x).

    `statistics` are those of x for the norm, where there are any.

    Derivatives of every order are those of the plain composition. Changing x, or the norm's
    parameters, in place before the backward raises RuntimeError, as it does for kept tensors.
    """
    y = norm(x, statistics)
    if not (torch.is_grad_enabled() and y.requires_grad) or torch.compiler.is_compiling():
        return layer(y, *more)
    # torch.func's transforms refuse hooks on what is kept
    if _keep_plainly.get() or torch._C._are_functorch_transforms_active():
        return layer(y, *more)
    address, size = y.data_ptr(), y.shape

    def pack(kept: Tensor) -> Tensor | _Recipe:
        is_y = kept.data_ptr() == address and kept.shape == size and kept.dtype == y_dtype
        return _Recipe(norm, x, statistics) if is_y else kept

    def unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.cook() if isinstance(kept, _Recipe) else kept

    y_dtype = y.dtype
    with saved_tensors_hooks(pack, unpack):
        return layer(y, *more)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    token = _keep_plainly.set(True)
    try:
        yield
    finally:
        _keep_plainly.reset(token)


def checkpointed(level: Callable[..., Tensor], *args: Any) -> Tensor:
    """level(*args), of which the backward keeps the arguments alone and computes the rest again."""

    def run(*inputs: Any) -> Tensor:
        with _plainly():
            return level(*inputs)

    return checkpoint(run, *args, use_reentrant=False)  # type: ignore[no-any-return]
