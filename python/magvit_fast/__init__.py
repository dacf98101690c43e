"""magvit_fast: masked video generation (MAGVIT, MAGVIT-v2) on compiled kernels."""

from __future__ import annotations

from magvit_fast import decoding, models, planning, tasks
from magvit_fast.compat.patch import PatchReport, patch, unpatch
from magvit_fast.decoding import generate
from magvit_fast.info import Info, info
from magvit_fast.ops import (
    blur_pool3d,
    causal_conv3d,
    confidence_remask,
    depth_to_space3d,
    factorized_embedding,
    group_norm_silu,
    lfq_codes,
    lfq_entropy,
    lfq_quantize,
    vq_nearest,
)

__version__ = "0.1.0"

__all__ = [
    "Info",
    "PatchReport",
    "blur_pool3d",
    "causal_conv3d",
    "confidence_remask",
    "decoding",
    "depth_to_space3d",
    "factorized_embedding",
    "generate",
    "group_norm_silu",
    "info",
    "lfq_codes",
    "lfq_entropy",
    "lfq_quantize",
    "models",
    "patch",
    "planning",
    "tasks",
    "unpatch",
    "vq_nearest",
]
