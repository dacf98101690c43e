"""Single layers of the tokenizer against Google's port: outputs, padding probes, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from magvit_fast import ops
from magvit_fast.compat.praxis import (
    load_praxis,
    praxis_slots,
    to_channels_first,
    to_channels_last,
    to_port,
)
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.nn.conv import CausalConv3d
from magvit_fast.nn.norm import AdaptiveGroupNorm, GroupNormSiLU, upsample_nearest
from magvit_fast.nn.resample import Upsample, strided_conv

Arrays = dict[str, NDArray[Any]]
Golden = Callable[[str], Arrays]

CONV_CASES = [
    "k3s111",
    "k3s111_nobias",
    "k4s122",
    "k4s222",
    "k4s222_odd",
    "k4s222_t1",
    "k4s122_t1",
    "k3s122",
    "k3s222",
    "k3s222_odd",
    "k3s222_t1",
    "k1s111",
    "k3s111_t1",
    "k3s111_1x1",
]
PROBES = ["probe_k3s111", "probe_k4s122", "probe_k4s222", "probe_k3s222", "probe_k3s122"]
NORM_CASES = ["gn64", "gn32", "gn128_offset", "gn16_fewer_than_32", "gn64_t1"]


def error(ours: Tensor, theirs: NDArray[Any]) -> float:
    """Largest absolute difference between [B, C, T, H, W] and the port's (B, T, H, W, C)."""
    array = to_channels_last(ours)
    assert array.shape == theirs.shape
    return float(np.abs(array.astype(np.float64) - theirs).max())


def parameter_error(module: nn.Module, path: str, theirs: NDArray[Any]) -> float:
    """Largest difference of one parameter's gradient, relative to the golden's maximum."""
    slot = next(slot for slot in praxis_slots(module) if slot.path == path)
    grad = module.get_parameter(slot.name).grad
    assert grad is not None
    ours = to_port(slot, grad).reshape(theirs.shape)
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())


def run(
    module: nn.Module, arrays: Arrays, case: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(y, dx) of a one-input module; parameter gradients are left on it."""
    load_praxis(module.to(device), arrays, case)
    x = to_channels_first(arrays[f"{case}/x"]).to(device).requires_grad_()
    y = module(x)
    y.backward(to_channels_first(arrays[f"{case}/dy"]).to(device))
    assert x.grad is not None
    return y, x.grad


def test_the_case_lists_are_complete(golden: Golden) -> None:
    conv = golden("causal_conv")
    assert sorted(conv["cases"].tolist()) == sorted(CONV_CASES)
    assert sorted({k.split("/")[0] for k in conv if k.startswith("probe")}) == sorted(PROBES)
    assert sorted({k.split("/")[0] for k in golden("group_norm_spatial")}) == sorted(NORM_CASES)


@pytest.mark.parametrize("case", CONV_CASES)
def test_causal_conv_is_bit_equal(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("causal_conv")
    kt, kh, kw, st, sh, sw = (int(v) for v in arrays[f"{case}/kernel_stride"])
    layer = CausalConv3d(3, 5, (kt, kh, kw), (st, sh, sw), bias=f"{case}/param/b" in arrays)
    y, dx = run(layer, arrays, case, device)
    assert error(y, arrays[f"{case}/y"]) == 0
    assert error(dx, arrays[f"{case}/dx"]) == 0
    assert parameter_error(layer, "w", arrays[f"{case}/dw"]) == 0
    if layer.bias is not None:
        assert parameter_error(layer, "b", arrays[f"{case}/db"]) == 0


@pytest.mark.parametrize("case", PROBES)
def test_causal_conv_reads_the_right_cells(golden: Golden, case: str, device: torch.device) -> None:
    """One output channel per tap, each an identity: the result is the cell that the tap reads."""
    arrays = golden("causal_conv")
    kernel_stride = tuple(int(v) for v in arrays[f"{case}/kernel_stride"])
    kernel, stride = kernel_stride[:3], kernel_stride[3:]
    t, h, w = (int(n) for n in arrays[f"{case}/input_thw"])
    cells = (
        10000 * torch.arange(t).view(t, 1, 1)
        + 100 * torch.arange(h).view(1, h, 1)
        + torch.arange(w).view(1, 1, w)
    )
    taps = int(np.prod(kernel))
    layer = CausalConv3d(1, taps, kernel, stride, bias=False).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.copy_(torch.eye(taps).view(taps, 1, *kernel))
        read = layer(cells.float().view(1, 1, t, h, w).to(device))
    expected = arrays[f"{case}/cell"]
    got = to_channels_last(read)[0].reshape(expected.shape)
    np.testing.assert_array_equal(got.astype(np.int64), expected)


@pytest.mark.parametrize("case", NORM_CASES)
def test_group_norm_per_frame(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("group_norm_spatial")
    layer = GroupNormSiLU(arrays[f"{case}/x"].shape[-1], activation=None)
    y, dx = run(layer, arrays, case, device)
    assert error(y, arrays[f"{case}/y"]) < 1e-5
    assert error(dx, arrays[f"{case}/dx"]) < 1e-5
    for path in ("gamma", "beta"):
        exact = arrays.get(f"{case}/d{path}.f64", arrays[f"{case}/d{path}"])
        assert parameter_error(layer, path, exact) < 1e-5


@pytest.mark.parametrize("case", ["cn64_e18", "cn128_e10"])
def test_adaptive_norm(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("cond_norm")
    channels, bits = arrays[f"{case}/x"].shape[-1], arrays[f"{case}/emb"].shape[-1]
    layer = AdaptiveGroupNorm(channels, bits).to(device)
    load_praxis(layer, arrays, case)
    x = to_channels_first(arrays[f"{case}/x"]).to(device).requires_grad_()
    condition = to_channels_first(arrays[f"{case}/emb"]).to(device).requires_grad_()
    y = layer(x, condition)
    y.backward(to_channels_first(arrays[f"{case}/dy"]).to(device))
    assert x.grad is not None
    assert condition.grad is not None
    assert error(y, arrays[f"{case}/y"]) < 1e-5
    assert error(x.grad, arrays[f"{case}/dx"]) < 1e-5
    assert (
        error(condition.grad, arrays[f"{case}/demb"]) < 1e-5 * np.abs(arrays[f"{case}/demb"]).max()
    )
    for slot in praxis_slots(layer):
        stored = f"{case}/grad/{slot.path}"
        exact = arrays.get(f"{stored}.f64", arrays[stored])
        assert parameter_error(layer, slot.path, exact) < 1e-5


@pytest.mark.parametrize(
    ("case", "conv_shortcut"),
    [
        ("res32_64", False),
        ("res64_64", False),
        ("res64_32", False),
        ("res32_64_conv3_shortcut", True),
    ],
)
def test_res_block(golden: Golden, case: str, device: torch.device, conv_shortcut: bool) -> None:
    arrays = golden("res_block")
    widths = arrays[f"{case}/x"].shape[-1], arrays[f"{case}/y"].shape[-1]
    layer = ResBlock3d(*widths, conv_shortcut=conv_shortcut)
    y, dx = run(layer, arrays, case, device)
    assert error(y, arrays[f"{case}/y"]) < 1e-5
    assert error(dx, arrays[f"{case}/dx"]) < 1e-5


@pytest.mark.parametrize("case", ["d2s_t1_T2", "d2s_t2_T3", "d2s_t2_T1"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_depth_to_space(
    golden: Golden, case: str, device: torch.device, channels_last: bool
) -> None:
    arrays = golden("resample")
    st = int(arrays[f"{case}/t_stride_filters"][0])
    x = to_channels_first(arrays[f"{case}/x"]).to(device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    y = ops.depth_to_space3d(x, (st, 2, 2))
    np.testing.assert_array_equal(to_channels_last(y), arrays[f"{case}/y"])


@pytest.mark.parametrize("case", ["up_t1_T3", "up_t2_T3", "up_t2_T1", "up_t1_T1"])
def test_upsample_is_bit_equal(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("resample")
    layer = Upsample(32, temporal="_t2_" in case).to(device)
    load_praxis(layer, arrays, case)
    with torch.no_grad():
        x = to_channels_first(arrays[f"{case}/x"]).to(device)
        assert error(layer(x), arrays[f"{case}/y"]) == 0
        whole = ops.depth_to_space3d(layer.conv(x), layer.factor)
        assert error(whole, arrays[f"{case}/y_before_drop"]) == 0
    condition = to_channels_first(arrays[f"{case}/cond"]).to(device)
    for name in ("cond_resized", "cond_out"):
        expected = arrays[f"{case}/{name}"]
        resized = upsample_nearest(condition, layer.factor, expected.shape[1])
        np.testing.assert_array_equal(to_channels_last(resized), expected)


@pytest.mark.parametrize("case", ["down_t1_T5", "down_t2_T5", "down_t2_T9", "down_t2_T1"])
def test_downsample_is_bit_equal(golden: Golden, case: str, device: torch.device) -> None:
    arrays = golden("resample")
    layer = strided_conv(32, temporal="_t2_" in case).to(device)
    load_praxis(layer, arrays, case)
    with torch.no_grad():
        y = layer(to_channels_first(arrays[f"{case}/x"]).to(device))
    assert error(y, arrays[f"{case}/y"]) == 0
