"""torch's own precision switches, as the float32 kernels read them.

Next hop: none; ops/causal_conv3d.py and ops/lfq_entropy.py ask at every call.
"""

from __future__ import annotations

from typing import Any

import torch


def strict() -> bool:
    """Whether torch is asked for full float32, by its setting for convolutions or else for matmuls.

    A fresh process says "none" to both, though torch.get_float32_matmul_precision() is "highest": only
    who calls torch.set_float32_matmul_precision("highest") has asked.
    """
    backend: Any = torch.backends.mkldnn
    precision = backend.conv.fp32_precision
    if precision == "none":
        precision = backend.matmul.fp32_precision
    return bool(precision == "ieee")


def full_matmul_on_cuda() -> bool:
    """Whether float32 matrix products on CUDA devices keep float32's precision: unless TF32 is allowed there.

    Allowed by torch.backends.cuda.matmul.fp32_precision = "tf32" (or, while that is "none",
    torch.backends.fp32_precision), and by what sets it: torch.set_float32_matmul_precision("high") or
    ("medium") and torch.backends.cuda.matmul.allow_tf32 = True.
    """
    backend: Any = torch.backends
    precision = backend.cuda.matmul.fp32_precision
    if precision == "none":
        precision = backend.fp32_precision
    return bool(precision != "tf32")
