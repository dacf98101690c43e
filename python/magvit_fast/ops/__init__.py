"""The ops: one file each, one name from here down to the kernels."""

from __future__ import annotations

from magvit_fast.ops.blur_pool3d import blur_pool3d
from magvit_fast.ops.causal_conv3d import causal_conv3d
from magvit_fast.ops.confidence_remask import confidence_remask
from magvit_fast.ops.depth_to_space3d import depth_to_space3d
from magvit_fast.ops.factorized_embedding import factorized_embedding
from magvit_fast.ops.group_norm_silu import group_norm_silu
from magvit_fast.ops.lfq_codes import lfq_codes
from magvit_fast.ops.lfq_entropy import lfq_entropy
from magvit_fast.ops.lfq_quantize import lfq_quantize
from magvit_fast.ops.vq_nearest import vq_nearest

__all__ = [
    "blur_pool3d",
    "causal_conv3d",
    "confidence_remask",
    "depth_to_space3d",
    "factorized_embedding",
    "group_norm_silu",
    "lfq_codes",
    "lfq_entropy",
    "lfq_quantize",
    "vq_nearest",
]
