"""Arguments of the wrong kind: every op names the argument, what it expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from magvit_fast import ops

X = torch.zeros(1, 8, 3, 4, 4)
W = torch.zeros(4, 8, 3, 3, 3)
IDS = torch.zeros(1, 4, dtype=torch.int64)
REMASK = (torch.zeros(1, 4, 2, 8), IDS, IDS == 0)

WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("causal_conv3d", (X, W), {"stride": 1.5}, r"stride: expected an int or three ints.*got 1\.5"),
    ("causal_conv3d", (X, W), {"stride": (1, 2.0, 2)}, r"stride: expected.*got \(1, 2\.0, 2\)"),
    ("causal_conv3d", (X, W), {"dilation": None}, "dilation: expected.*got None"),
    ("causal_conv3d", (X, W), {"padding": 1}, "padding: expected None or six ints.*got 1"),
    ("causal_conv3d", (X, W), {"padding": "same"}, "padding: expected None or six ints.*'same'"),
    ("causal_conv3d", (X, W), {"padding": (0.5,) * 6}, r"padding: expected an int, got float 0\.5"),
    ("causal_conv3d", (X, W), {"groups": 2.0}, r"groups: expected an int, got float 2\.0"),
    ("causal_conv3d", (X, None), {}, "weight: expected a Tensor, got NoneType"),
    ("causal_conv3d", (X.numpy(), W), {}, "x: expected a Tensor, got ndarray"),
    ("group_norm_silu", (X, 2.0), {}, r"num_groups: expected an int, got float 2\.0"),
    ("group_norm_silu", (X, None), {}, "num_groups: expected an int, got NoneType None"),
    ("group_norm_silu", (X, 2), {"eps": "small"}, "eps: expected a number, got str 'small'"),
    ("depth_to_space3d", (X, 2.0), {}, r"factor: expected an int or three ints.*got 2\.0"),
    ("depth_to_space3d", (X, 2), {"drop_first": 1.0}, r"drop_first: expected an int, got float"),
    ("blur_pool3d", (X, "2"), {}, "stride: expected an int or three ints.*got '2'"),
    ("blur_pool3d", (X,), {"filter_size": 2.5}, r"filter_size: expected an int, got float 2\.5"),
    ("lfq_codes", (IDS, 6.0), {}, r"num_bits: expected an int, got float 6\.0"),
    ("lfq_codes", (IDS, 6), {"channel_dim": None}, "channel_dim: expected an int, got NoneType"),
    (
        "lfq_entropy",
        (X,),
        {"inv_temperature": "hot"},
        "inv_temperature: expected a number, got str",
    ),
    ("lfq_entropy", (X,), {"eps": None}, "eps: expected a number, got NoneType"),
    (
        "vq_nearest",
        (X, W[0, :, 0, 0]),
        {"channel_dim": "1"},
        "channel_dim: expected an int, got str",
    ),
    ("factorized_embedding", (IDS.int(), W[:, 0]), {}, r"ids: expected dtype torch\.int64"),
    ("confidence_remask", REMASK, {"num_unknown": 2.0}, r"num_unknown: expected an int, got float"),
    ("confidence_remask", REMASK, {"num_unknown": True}, "num_unknown: expected an int, got bool"),
    ("confidence_remask", REMASK, {"num_unknown": 1, "seed": 0.5}, "seed: expected an int, got fl"),
    (
        "confidence_remask",
        REMASK,
        {"num_unknown": 1, "step": None},
        "step: expected an int, got No",
    ),
    (
        "confidence_remask",
        REMASK,
        {"num_unknown": 1, "temperature": "a"},
        "temperature: expected a",
    ),
    ("lfq_quantize", (X,), {"channel_dim": 1.0}, r"channel_dim: expected an int, got float 1\.0"),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "message"), WRONG)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_wrong_kind_is_named(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str, autocast: bool
) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=message),
    ):
        getattr(ops, op)(*args, **kwargs)


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_an_epsilon_that_is_none(eps: float) -> None:
    with pytest.raises(ValueError, match="eps: expected a finite number, 0 or more"):
        ops.group_norm_silu(X, 2, eps=eps)


def test_autocast_turns_no_integers_into_a_video() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="x: expected a floating-point dtype"),
    ):
        ops.causal_conv3d(X.long(), W)


def test_blur_pool3d_names_an_input_without_channels() -> None:
    with pytest.raises(ValueError, match="x: expected at least one channel"):
        ops.blur_pool3d(X[:, :0])


def test_numpy_integers_are_integers() -> None:
    two = np.int64(2)
    assert ops.depth_to_space3d(X, two).shape == (1, 1, 6, 8, 8)
    assert ops.causal_conv3d(X, W, stride=(1, two, two)).shape == (1, 4, 3, 2, 2)
