"""torch's own precision switches, as the float32 kernels of the CPU read them.

Next hop: none; ops/causal_conv3d.py asks at every call.
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
