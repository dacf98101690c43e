"""Weights of Google's MAGVIT-v2 port (google/praxis, layers/video) for our modules.

    config = praxis_config(settings)            # the port's own settings, a mapping or JSON
    model = MagvitV2Tokenizer(config)
    load_praxis(model, {name: array})           # or one layer: load_praxis(layer, arrays, prefix)

Parameter names there are paths such as `encoder/res_blocks_3/conv_0/w`, often stored under
`param/` or `<case>/param/`. The rules of conversion:

    convolution `w` (kT, kH, kW, C_in, C_out)   weight [C_out, C_in, KT, KH, KW]
    linear `w` (in, out)                        weight [out, in]
    group norm `gamma` (1, 1, 1, C)             weight [C] = 1 + gamma: an offset from one there
    every bias and `beta`                       flat, unchanged
    encoder/res_blocks_k                        blocks of all levels in order, then the final ones
    decoder/res_blocks_k                        blocks beside the latent, then levels, deepest first
    encoder/conv_downsample_layers_i            after level i, shallow to deep
    decoder/cond_norm_layers_j,
    decoder/conv_upsample_layers_j              in the order of execution: j = 0 is the deepest
    discriminator: res_blocks_i/conv_residual   the skip branch of block i
    discriminator: proj/mlp_layers_{0,1}        the two dense layers (linear/w and bias/b)

Activations are (B, T, H, W, C) there and [B, C, T, H, W] here: `to_channels_first` and
`to_channels_last` convert.

Differences that remain: an exact zero quantizes to +1 there and to -1 here (the paper's rule). The
port guards its codebook entropy by 1e-5 inside the logarithm; `praxis_config` sets entropy_eps
accordingly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from magvit_fast.compat._arrays import few, select
from magvit_fast.models.autoencoder import Decoder, Encoder
from magvit_fast.models.discriminator import (
    Discriminator3D,
    DiscriminatorBlock,
    DiscriminatorConfig,
)
from magvit_fast.models.magvit_v2 import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.nn.blocks import ResBlock3d
from magvit_fast.nn.conv import CausalConv3d, SameConv3d
from magvit_fast.nn.norm import AdaptiveGroupNorm, GroupNormSiLU
from magvit_fast.nn.resample import Upsample

Kind = Literal["conv", "linear", "gamma", "vector"]

# Settings of the port -> field of our config.
_FIELDS = {
    "filters": "filters",
    "channel_multipliers": "channel_multipliers",
    "temporal_downsample": "temporal_downsample",
    "num_res_blocks": "num_res_blocks",
    "embedding_dim": "num_bits",
    "use_conv_shortcut": "conv_shortcut",
    "conv_shortcut": "conv_shortcut",
    "num_token_groups": "num_token_groups",
    "entropy_loss_groups": "entropy_groups",
    "entropy_loss_ratio": "entropy_weight",
    "entropy_loss_balance": "entropy_balance",
    "entropy_loss_type": "entropy_kind",
    "entropy_temperature": "temperature",
    "commitment_cost": "commitment_weight",
}


@dataclass(frozen=True)
class Slot:
    """One parameter of ours and where the port keeps it: `path` there, `name` here."""

    path: str
    name: str
    kind: Kind


def praxis_slots(module: nn.Module) -> list[Slot]:
    """Where every parameter of `module` lives in the port.

    Takes a MagvitV2Tokenizer, its Encoder or Decoder, CausalConv3d, Upsample,
    ResBlock3d, GroupNormSiLU, AdaptiveGroupNorm, nn.Linear (a feed-forward layer there),
    DiscriminatorBlock or Discriminator3D.

    Raises:
        TypeError: any other module.
    """
    return list(_slots(module))


def _slots(module: nn.Module) -> Iterator[Slot]:
    if isinstance(module, CausalConv3d | SameConv3d):
        yield Slot("w", "weight", "conv")
        if module.bias is not None:
            yield Slot("b", "bias", "vector")
    elif isinstance(module, GroupNormSiLU):
        yield Slot("gamma", "weight", "gamma")
        yield Slot("beta", "bias", "vector")
    elif isinstance(module, AdaptiveGroupNorm):
        for ours, theirs in (("scale", "gamma"), ("shift", "beta")):
            yield Slot(f"{theirs}_linear/w", f"{ours}.weight", "linear")
            yield Slot(f"{theirs}_bias/b", f"{ours}.bias", "vector")
    elif isinstance(module, nn.Linear):
        yield Slot("linear/w", "weight", "linear")
        yield Slot("bias/b", "bias", "vector")
    else:
        for path, name, child in _children(module):
            for slot in _slots(child):
                yield Slot(f"{path}{slot.path}", f"{name}.{slot.name}", slot.kind)


def _children(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(path prefix in the port, name here, child) of a compound module."""
    if isinstance(module, Upsample):
        yield "", "conv", module.conv
    elif isinstance(module, ResBlock3d):
        yield "norm_0/", "norm1", module.norm1
        yield "conv_0/", "conv1", module.conv1
        yield "norm_1/", "norm2", module.norm2
        yield "conv_1/", "conv2", module.conv2
        if module.shortcut is not None:
            yield "conv_shortcut/", "shortcut", module.shortcut
    elif isinstance(module, Encoder | Decoder):
        yield "conv_first/", "conv_in", module.conv_in
        yield "norm/", "norm_out", module.norm_out
        yield "conv_last/", "conv_out", module.conv_out
        yield from _res_blocks(module)
        for i, level in enumerate(module.levels):
            if isinstance(module, Decoder):
                yield (
                    f"cond_norm_layers_{i}/",
                    f"levels.{i}.cond_norm",
                    level.get_submodule("cond_norm"),
                )
            step, path = (
                ("down", "downsample") if isinstance(module, Encoder) else ("up", "upsample")
            )
            if getattr(level, step) is not None:
                yield f"conv_{path}_layers_{i}/", f"levels.{i}.{step}", level.get_submodule(step)
    elif isinstance(module, MagvitV2Tokenizer):
        yield "encoder/", "encoder", module.encoder
        yield "decoder/", "decoder", module.decoder
    elif isinstance(module, DiscriminatorBlock):
        yield "conv_first/", "conv_first", module.conv_first
        yield "conv_last/", "conv_last", module.conv_last
        yield "conv_residual/", "conv_skip", module.conv_skip
    elif isinstance(module, Discriminator3D):
        yield "conv_first/", "conv_in", module.conv_in
        for i, block in enumerate(module.blocks):
            yield f"res_blocks_{i}/", f"blocks.{i}", block
        yield "conv_last/", "conv_out", module.conv_out
        yield "proj/mlp_layers_0/", "dense", module.dense
        yield "proj/mlp_layers_1/", "logit", module.logit
    else:
        raise TypeError(f"module: {type(module).__name__} has no counterpart in the port")


def _res_blocks(module: Encoder | Decoder) -> Iterator[tuple[str, str, nn.Module]]:
    places = [f"levels.{i}.blocks" for i in range(len(module.levels))]
    places = [*places, "mid_blocks"] if isinstance(module, Encoder) else ["mid_blocks", *places]
    names = [
        f"{place}.{j}"
        for place in places
        for j in range(len(list(module.get_submodule(place).children())))
    ]
    for k, name in enumerate(names):
        yield f"res_blocks_{k}/", name, module.get_submodule(name)


# ---- arrays --------------------------------------------------------------------------------------
def to_channels_first(x: NDArray[Any]) -> Tensor:
    """(B, T, H, W, C) -> Tensor [B, C, T, H, W] (a copy)."""
    return torch.from_numpy(np.array(np.moveaxis(x, -1, 1)))


def to_channels_last(x: Tensor) -> NDArray[Any]:
    """[B, C, T, H, W] -> (B, T, H, W, C) on the CPU."""
    array: NDArray[Any] = np.ascontiguousarray(np.moveaxis(x.detach().cpu().numpy(), 1, -1))
    return array


def to_port(slot: Slot, value: Tensor) -> NDArray[Any]:
    """A parameter's gradient (or any quantity linear in it) in the port's layout."""
    array = value.detach().cpu().numpy()
    if slot.kind == "conv":
        array = array.transpose(2, 3, 4, 1, 0)
    elif slot.kind == "linear":
        array = array.T
    elif slot.kind == "gamma" or slot.path.endswith("beta"):
        array = array.reshape(1, 1, 1, -1)
    result: NDArray[Any] = np.ascontiguousarray(array)
    return result


def _from_port(kind: Kind, array: NDArray[Any]) -> Tensor:
    # float64 on the way: 1 + gamma is then rounded once, when it is copied into the parameter.
    value = torch.from_numpy(np.array(array, dtype=np.float64))
    if kind == "conv" and value.dim() == 5:
        return value.permute(4, 3, 0, 1, 2)
    if kind == "linear" and value.dim() == 2:
        return value.T
    return value.reshape(-1) + 1 if kind == "gamma" else value.reshape(-1)


# ---- public --------------------------------------------------------------------------------------
def praxis_config(settings: Mapping[str, Any] | str, **changes: Any) -> MagvitV2Config:
    """The config of a tokenizer of the port from its settings (a mapping or its JSON text).

    Missing settings take the values of the port's published model; entropy_eps is 1e-5, the port's
    guard. Settings that say nothing about the model (num_params) are ignored.

    Raises:
        ValueError: a setting that is not known.
    """
    given = json.loads(settings) if isinstance(settings, str) else dict(settings)
    given.pop("num_params", None)
    unknown = sorted(set(given) - set(_FIELDS))
    if unknown:
        raise ValueError(
            f"settings: expected some of {', '.join(_FIELDS)}; got {', '.join(unknown)}"
        )
    fields = {_FIELDS[key]: value for key, value in given.items()}
    return MagvitV2Config(**{"entropy_eps": 1e-5, **fields, **changes})


def praxis_discriminator_config(settings: Mapping[str, Any] | str) -> DiscriminatorConfig:
    """The config of a discriminator of the port from its settings (a mapping or its JSON text).

    num_frames, image_height and image_width (1, 256 and 256 if missing, as there), filters,
    channel_multipliers ((2, 4, 4, 4) if missing: the port's default, not the published five),
    blur_filter_size and input_dim. num_params is ignored.

    Raises:
        ValueError: a setting that is not known.
    """
    given = json.loads(settings) if isinstance(settings, str) else dict(settings)
    given.pop("num_params", None)
    sizes = (("num_frames", 1), ("image_height", 256), ("image_width", 256))
    clip = tuple(int(given.pop(key, missing)) for key, missing in sizes)
    names = {
        "filters": "filters",
        "channel_multipliers": "channel_multipliers",
        "blur_filter_size": "blur_size",
        "input_dim": "in_channels",
    }
    if unknown := sorted(set(given) - set(names)):
        expected = ", ".join([key for key, _ in sizes] + list(names))
        raise ValueError(f"settings: expected some of {expected}; got {', '.join(unknown)}")
    fields = {names[key]: value for key, value in given.items()}
    return DiscriminatorConfig(**{"channel_multipliers": (2, 4, 4, 4), **fields, "clip": clip})


@torch.no_grad()
def load_praxis(
    module: nn.Module, arrays: Mapping[str, NDArray[Any] | Tensor], prefix: str = ""
) -> None:
    """Fill `module` with the port's parameters, in place.

    Args:
        module: a whole tokenizer or one layer, see `praxis_slots`.
        arrays: name -> array, any float dtype (an open npz file will do). Names may carry `param/`
            in front. Entries that are no parameters of the module's tree are only allowed outside
            `param/`.
        prefix: what comes before `param/` (a case name such as "cn64_e18"), or a sub-path after it
            (such as "decoder/res_blocks_0") when one layer of a larger model is wanted.

    Raises:
        ValueError: a parameter is missing, left over, not finite or of the wrong shape; nothing has
            been changed then.
        TypeError: the module has no counterpart in the port.
    """
    found = select(arrays, prefix)
    slots = praxis_slots(module)
    wanted = {slot.path for slot in slots}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"arrays: {len(missing)} parameter(s) missing: {few(missing)}")
    if extra := sorted(set(found) - wanted):
        raise ValueError(f"arrays: {len(extra)} parameter(s) have no place: {few(extra)}")
    parameters = dict(module.named_parameters())
    values = []
    for slot in slots:
        raw = found[slot.path]
        value = _from_port(
            slot.kind, raw.detach().cpu().numpy() if isinstance(raw, Tensor) else raw
        )
        target = parameters[slot.name]
        if value.shape != target.shape:
            raise ValueError(
                f"arrays: {slot.path} gives shape {tuple(value.shape)}, "
                f"{slot.name} expects {tuple(target.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"arrays: {slot.path} has values that are not finite")
        values.append((target, value))
    for target, value in values:
        target.copy_(value)
