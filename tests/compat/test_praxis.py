"""Loading the port's parameters: names, layouts, errors. (Values are tested in goldens_v2.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from magvit_fast.compat.praxis import (
    load_praxis,
    praxis_config,
    praxis_slots,
    to_channels_first,
    to_channels_last,
    to_port,
)
from magvit_fast.models import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.nn.conv import CausalConv3d

FILE = Path(__file__).parent.parent / "data" / "goldens" / "magvit_v2" / "tokenizer_w32_m12_d10.npz"


def exported(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The port's parameters of a model of ours, by the inverse rules."""
    arrays = {}
    for slot in praxis_slots(model):
        value = model.get_parameter(slot.name)
        offset = 1 if slot.kind == "gamma" else 0
        arrays[f"param/{slot.path}"] = to_port(slot, value - offset)
    return arrays


@pytest.mark.parametrize(
    "config",
    [
        MagvitV2Config(4, (1,), (), 1, 3),
        MagvitV2Config(8, (1, 2, 3), (False, True), 2, 7, conv_shortcut=True),
        MagvitV2Config(16, (2, 1, 2, 4, 1), (True, False, True, True), 1, 12),
    ],
    ids=["one-level", "three-levels", "five-levels"],
)
def test_every_configuration_goes_there_and_back(config: MagvitV2Config) -> None:
    torch.manual_seed(0)
    first, second = MagvitV2Tokenizer(config), MagvitV2Tokenizer(config)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(torch.randint(-64, 64, parameter.shape) / 64)
    arrays = exported(first)
    assert len(arrays) == len(list(first.parameters()))
    load_praxis(second, arrays)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_names_of_the_published_model() -> None:
    with torch.device("meta"):
        paths = {slot.path for slot in praxis_slots(MagvitV2Tokenizer(MagvitV2Config()))}
    for expected in (
        "encoder/res_blocks_19/conv_1/w",
        "encoder/conv_downsample_layers_2/b",
        "encoder/res_blocks_4/conv_shortcut/w",
        "encoder/res_blocks_12/conv_shortcut/w",
        "decoder/res_blocks_19/norm_1/gamma",
        "decoder/res_blocks_8/conv_shortcut/w",
        "decoder/res_blocks_16/conv_shortcut/w",
        "decoder/cond_norm_layers_3/gamma_linear/w",
        "decoder/conv_upsample_layers_2/w",
    ):
        assert expected in paths
    shortcuts = [p for p in paths if "shortcut" in p]
    assert len(shortcuts) == 4
    assert not any("encoder/conv_first/b" in p or "res_blocks_20" in p for p in paths)


def test_config_of_the_port() -> None:
    config = praxis_config(
        {
            "filters": 64,
            "channel_multipliers": [1, 2],
            "temporal_downsample": [True],
            "embedding_dim": 12,
            "num_res_blocks": 3,
            "num_token_groups": 2,
            "entropy_loss_groups": 4,
            "entropy_loss_ratio": 0.2,
            "entropy_loss_balance": 0.5,
            "entropy_loss_type": "argmax",
            "entropy_temperature": 0.1,
            "commitment_cost": 1.0,
            "use_conv_shortcut": True,
            "num_params": 1,
        }
    )
    assert config == MagvitV2Config(
        filters=64,
        channel_multipliers=(1, 2),
        temporal_downsample=(True,),
        num_res_blocks=3,
        num_bits=12,
        conv_shortcut=True,
        num_token_groups=2,
        entropy_groups=4,
        entropy_weight=0.2,
        entropy_balance=0.5,
        commitment_weight=1.0,
        temperature=0.1,
        entropy_eps=1e-5,
        entropy_kind="argmax",
    )
    assert praxis_config("{}") == MagvitV2Config(entropy_eps=1e-5)
    assert praxis_config({}, entropy_eps=0.0) == MagvitV2Config()
    with pytest.raises(ValueError, match=r"settings: expected some of filters, .*; got depth"):
        praxis_config({"depth": 3})


def test_one_layer_out_of_a_whole_model() -> None:
    with np.load(FILE) as arrays:
        whole = MagvitV2Tokenizer(praxis_config(str(arrays["config_json"])))
        load_praxis(whole, arrays)
        block = ResBlock3d(64, 32)
        load_praxis(block, arrays, "decoder/res_blocks_2")
    assert whole.decoder.levels[1].blocks is not None
    for name, value in block.state_dict().items():
        assert torch.equal(whole.decoder.state_dict()[f"levels.1.blocks.0.{name}"], value)


def test_bare_names_and_tensors_do() -> None:
    layer, other = CausalConv3d(2, 3), CausalConv3d(2, 3)
    arrays = {name.removeprefix("param/"): value for name, value in exported(layer).items()}
    load_praxis(other, {name: torch.from_numpy(value) for name, value in arrays.items()})
    assert torch.equal(other.weight, layer.weight)


def test_gamma_is_rounded_once() -> None:
    """1 + gamma in the parameter's own precision, not in the stored one."""
    block = ResBlock3d(4, 4)
    arrays = exported(block)
    arrays["param/norm_0/gamma"] = np.full((1, 1, 1, 4), 2.0**-14, dtype=np.float16)
    load_praxis(block, arrays)
    assert torch.equal(block.norm1.weight, torch.full((4,), 1 + 2.0**-14))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param/w": None}, r"1 parameter\(s\) missing: w"),
        ({"param/v": np.zeros(3)}, r"1 parameter\(s\) have no place: v"),
        (
            {"param/w": np.zeros((3, 3, 3, 3, 2))},
            r"w gives shape \(2, 3, 3, 3, 3\), weight expects",
        ),
        ({"param/b": np.zeros(4)}, r"b gives shape \(4,\), bias expects \(3,\)"),
        ({"param/b": np.array([0, np.nan, 0])}, "b has values that are not finite"),
    ],
)
def test_bad_arrays_change_nothing(change: dict[str, Any], message: str) -> None:
    layer = CausalConv3d(2, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    arrays = {**exported(CausalConv3d(2, 3)), **change}
    with pytest.raises(ValueError, match=message):
        load_praxis(layer, {k: v for k, v in arrays.items() if v is not None})
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_a_module_without_a_counterpart() -> None:
    with pytest.raises(TypeError, match="module: Conv2d has no counterpart"):
        praxis_slots(nn.Conv2d(1, 1, 1))


def test_activations_convert_both_ways() -> None:
    x = np.arange(2 * 3 * 4 * 5 * 6, dtype=np.float32).reshape(2, 3, 4, 5, 6)
    ours = to_channels_first(x)
    assert ours.shape == (2, 6, 3, 4, 5)
    np.testing.assert_array_equal(to_channels_last(ours), x)
