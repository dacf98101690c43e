"""The CPU kernels: addresses, sizes and numbers in, nothing allocated (csrc/<op>/bindings.cpp).

Every kernel ends with (instruction-set level, number of threads), as `_native.launcher` gives them. An address of 0
stands for an absent tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

def build_info() -> dict[str, str]: ...
def detect_isa() -> int: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def core_latency_ns() -> float: ...
def causal_conv3d_forward_workspace(shape: Sequence[int], where: int, how: int) -> int: ...
def causal_conv3d_input_grad_workspace(shape: Sequence[int], where: int, how: int) -> int: ...
def causal_conv3d_weight_grad_workspace(shape: Sequence[int], where: int, how: int) -> int: ...
def causal_conv3d_forward(
    x: int,
    history: int,
    weight: int,
    bias: int,
    residual: int,
    y: int,
    workspace: int,
    shape: Sequence[int],
    where: int,
    how: int,
) -> None: ...
def causal_conv3d_input_grad(
    dy: int,
    weight: int,
    dx: int,
    dhistory: int,
    workspace: int,
    shape: Sequence[int],
    where: int,
    how: int,
) -> None: ...
def causal_conv3d_weight_grad(
    x: int,
    history: int,
    dy: int,
    dweight: int,
    workspace: int,
    shape: Sequence[int],
    where: int,
    how: int,
) -> None: ...
def causal_conv3d_packing(
    shape: Sequence[int], forward: bool, where: int, how: int
) -> tuple[int, int]: ...
def causal_conv3d_pack(
    weight: int, packed: int, shape: Sequence[int], forward: bool, where: int, how: int
) -> None: ...
def causal_conv3d_weight_mark(weight: int, bytes: int, where: int, how: int) -> int: ...
def causal_conv3d_source_index(axis: Sequence[int], o: int, k: int) -> int: ...
def causal_conv3d_readers(axis: Sequence[int], s: int, k: int) -> list[int]: ...
def causal_conv3d_sm90_walk(
    numbers: Sequence[int], forward: bool, multiprocessors: int
) -> list[int]: ...
def causal_conv3d_sm90_weight_walk(
    numbers: Sequence[int],
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]: ...
def causal_conv3d_wgmma_descriptor_mn(address: int, leading: int) -> int: ...
def causal_conv3d_wgmma_descriptor(address: int) -> int: ...
def causal_conv3d_swizzle(offset: int) -> int: ...
def group_norm_silu_takes_planes(adaptive: bool) -> bool: ...
def group_norm_silu_workspace_bytes(numbers: Sequence[int], where: int, how: int) -> int: ...
def group_norm_silu_forward(
    numbers: Sequence[int],
    eps: float,
    y: int,
    stats: int,
    workspace: int,
    ready: bool,
    where: int,
    how: int,
) -> None: ...
def group_norm_silu_backward(
    numbers: Sequence[int],
    dy: int,
    stats: int,
    dx: int,
    dweight: int,
    dbias: int,
    dscale: int,
    dshift: int,
    workspace: int,
    where: int,
    how: int,
) -> None: ...
def depth_to_space3d_permute(
    source: int,
    result: int,
    batch: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    factor_t: int,
    factor_h: int,
    factor_w: int,
    dropped: int,
    element_bytes: int,
    channels_last: bool,
    to_depth: bool,
    where: int,
    how: int,
) -> None: ...
def blur_pool3d_filter(
    source: int,
    result: int,
    batch: int,
    channels: int,
    axes: Sequence[int],
    taps: int,
    transpose: bool,
    dtype: int,
    where: int,
    how: int,
) -> None: ...
def vq_nearest_workspace_bytes(codes: int, channels: int, where: int, how: int) -> int: ...
def vq_nearest_search(
    z: int,
    codebook: int,
    indices: int,
    workspace: int,
    outer: int,
    channels: int,
    inner: int,
    outer_stride: int,
    channel_stride: int,
    inner_stride: int,
    codes: int,
    dtype: int,
    where: int,
    how: int,
) -> None: ...
def lfq_quantize_forward(
    z: int,
    quantized: int,
    indices: int,
    outer: int,
    channels: int,
    inner: int,
    outer_stride: int,
    channel_stride: int,
    inner_stride: int,
    dtype: int,
    msb_first: bool,
    where: int,
    how: int,
) -> None: ...
def lfq_codes_forward(
    indices: int,
    codes: int,
    bad: int,
    outer: int,
    channels: int,
    inner: int,
    dtype: int,
    msb_first: bool,
    where: int,
    how: int,
) -> None: ...
def lfq_entropy_workspace_bytes(positions: int, channels: int, where: int, how: int) -> int: ...
def lfq_entropy_sums(
    z: int,
    mask: int,
    outer: int,
    channels: int,
    inner: int,
    outer_stride: int,
    channel_stride: int,
    inner_stride: int,
    dtype: int,
    scale: float,
    stats: int,
    probs: int,
    workspace: int,
    full_precision: bool,
    where: int,
    how: int,
) -> None: ...
def lfq_entropy_codebook(
    probs: int,
    stats: int,
    per_sample: int,
    entropy: int,
    workspace: int,
    codes: int,
    eps: float,
    clamp: bool,
    where: int,
    how: int,
) -> None: ...
def lfq_entropy_backward(
    z: int,
    mask: int,
    outer: int,
    channels: int,
    inner: int,
    outer_stride: int,
    channel_stride: int,
    inner_stride: int,
    dtype: int,
    scale: float,
    probs: int,
    stats: int,
    grad_sample: int,
    grad_codebook: int,
    grad_z: int,
    workspace: int,
    eps: float,
    clamp: bool,
    full_precision: bool,
    where: int,
    how: int,
) -> None: ...
def factorized_embedding_workspace_bytes(
    positions: int,
    dim: int,
    groups: int,
    bits: int,
    dtype: int,
    where: int,
    how: int,
) -> int: ...
def factorized_embedding_forward(
    ids: int,
    mask: int,
    positions: int,
    dim: int,
    groups: int,
    bits: int,
    dtype: int,
    weight: int,
    mask_embedding: int,
    out: int,
    bad: int,
    where: int,
    how: int,
) -> None: ...
def factorized_embedding_backward(
    ids: int,
    mask: int,
    positions: int,
    dim: int,
    groups: int,
    bits: int,
    dtype: int,
    grad: int,
    grad_weight: int,
    grad_mask_embedding: int,
    workspace: int,
    where: int,
    how: int,
) -> None: ...
def confidence_remask(
    logits: int,
    tokens: int,
    unknown: int,
    num_unknown: int,
    value_noise: int,
    choice_noise: int,
    new_tokens: int,
    new_unknown: int,
    bad: int,
    workspace: int,
    batch: int,
    length: int,
    groups: int,
    bits: int,
    dtype: int,
    temperature: float,
    choice_temperature: float,
    seed: int,
    step: int,
    where: int,
    how: int,
) -> None: ...
