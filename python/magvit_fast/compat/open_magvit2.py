"""Weights of Open-MAGVIT2's tokenizers (TencentARC/SEED-Voken), of video and of images, as ours.

    tokenizer = load_open_magvit2("video_128_262144.ckpt")        # a MagvitV2Tokenizer
    ids = tokenizer.encode(video)                                  # video in [0, 1] here, [-1, 1] there

Theirs differ from MAGVIT-v2's in these parts, all fields of MagvitV2Config:

    pad_mode="zeros"                 convolutions pad with zeros
    down_kernel=3                    strided convolutions of 3x3x3 (time: two frames in front)
    clip_norms=True                  group norms span the clip, so that nothing streams
    norm_condition="statistics"      adaptive norms: deviation and mean of the latent's channels
    keep_first_frame=True            up-sampling drops frame 1 in place of frame 0
    signed_pixels=True               the networks work on [-1, 1]
    entropy_eps=1e-5                 added inside the logarithm of the codebook entropy

and images go through 2D networks: frame_by_frame=True with norms of each image. Widths, levels,
blocks, bits and shortcuts are read off the shapes. Ids are the same numbers as theirs (channel 0 is
the least significant bit; theirs are flat): compat.token_ids splits and converts them.

Names. `conv_1` stands before weight and bias of every 3D convolution there.

    {encoder|decoder}.conv_in, .norm_out, .conv_out         the same
    .mid_block.j                                            mid_blocks.j
    encoder.down.i.block.j, .downsample                     encoder.levels.i.blocks.j, .down
    decoder.up.i.block.j, .upsample.conv1                   decoder.levels.k.blocks.j, .up.conv
    decoder.adaptive.i.{gamma,beta}                         decoder.levels.k.cond_norm.{scale,shift}
    nin_shortcut (1x1x1), conv_shortcut (3x3x3)             shortcut
    model_ema.<name without its dots>                       the running averages

with k = levels - 1 - i: ours are in the order of execution. Their adaptive norm multiplies by gamma
and ours by 1 + scale, so that the bias of scale is that of gamma less one. Keys of losses,
discriminators and quantizer buffers are left out.

Where a latent has one position alone, its deviation is undefined there (NaN), and 0.001 here: that of
a channel which does not vary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from magvit_fast.compat._files import fill, key_faults, read_checkpoint, shapes_of, tensors_of
from magvit_fast.errors import FileFormatError
from magvit_fast.models.magvit_v2 import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.nn.conv import CausalConv3d

Shapes = Mapping[str, tuple[int, ...]]

# Parts of a checkpoint beside the networks; the first word of a key.
_IGNORED = re.compile(r"(loss|discriminator|quantize|lpips|inception|colorize)")
_EMA = "model_ema."


def load_open_magvit2(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    ema: bool | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> MagvitV2Tokenizer:
    """A tokenizer of Open-MAGVIT2, in evaluation mode on the CPU.

    Args:
        source: a .safetensors file, a Lightning .ckpt or .pt file (its "state_dict" entry, or the
            whole where it is one), or a state_dict.
        ema: whether the running averages of the weights are taken. None: where there are any, as in
            their own evaluation.
        dtype: of the parameters.
        changes: config fields that differ from what the shapes say, such as entropy_weight.

    Raises:
        FileFormatError: the file is missing, damaged, holds other objects than tensors, or is of
            another model. Every key that is missing, superfluous or of a wrong shape is named.
        ValueError: the same for a state_dict.
        TypeError: an unknown config field.
    """
    if isinstance(source, Mapping):
        return _load(source, ema, dtype, changes)
    checkpoint = read_checkpoint(source)
    try:
        return _load(checkpoint, ema, dtype, changes)
    except ValueError as error:
        raise FileFormatError(f"{os.fspath(source)}: {error}") from error


def open_magvit2_config(shapes: Shapes, **changes: Any) -> MagvitV2Config:
    """The config of a tokenizer of theirs from the shapes of its state_dict.

    Args:
        shapes: key -> shape, encoder and decoder, without `model_ema.`; dots may be missing.
        changes: fields that differ.

    Raises:
        ValueError: a key that decides a field is missing, or the shapes contradict each other.
    """
    table = {_plain(name): tuple(shape) for name, shape in shapes.items()}
    levels = _count(table, r"encoderdown(\d+)block")
    ups = [f"decoder.up.{i}.upsample.conv1.weight" for i in range(1, levels)]
    norms = [f"encoder.down.{i}.block.0.norm2.weight" for i in range(levels)]
    ends = ["encoder.conv_in.weight", "encoder.conv_out.weight"]
    if missing := [name for name in (*ends, *norms, *ups) if _plain(name) not in table]:
        raise ValueError(
            f"no tokenizer of Open-MAGVIT2: {', '.join(missing)} missing "
            "(3D networks: conv_1.weight in place of weight)"
        )
    for name in (*ends, *norms, *ups):
        shape = table[_plain(name)]
        if len(shape) not in ((1,) if name in norms else (4, 5)) or 0 in shape:
            raise ValueError(f"{name} has shape {shape}: that of no such layer")
    first, last = (table[_plain(name)] for name in ends)
    flat = len(first) == 4  # images
    filters, widths = first[0], [table[_plain(name)][0] for name in norms]
    if any(width % filters for width in widths):
        raise ValueError(f"widths {widths} of the levels: expected multiples of {filters}")
    # Depth to space takes the channels of 4 positions, or of 8 where time is doubled as well.
    blocks = [table[_plain(name)] for name in ups]
    fields: dict[str, Any] = {
        "filters": filters,
        "channel_multipliers": tuple(width // filters for width in widths),
        "temporal_downsample": tuple(not flat and up[0] == 8 * up[1] for up in blocks),
        "num_res_blocks": _count(table, r"encoderdown0block(\d+)"),
        "num_bits": last[0],
        "in_channels": first[1],
        "conv_shortcut": any("conv_shortcut" in name for name in table),
        "pad_mode": "zeros",
        "frame_by_frame": flat,
        "clip_norms": not flat,
        "down_kernel": 3,
        "norm_condition": "statistics",
        "keep_first_frame": True,
        "signed_pixels": True,
        "entropy_eps": 1e-5,
    }
    return MagvitV2Config(**{**fields, **changes})


def open_magvit2_names(model: MagvitV2Tokenizer) -> dict[str, str]:
    """Parameter of ours -> their key, for a model whose config has the parts listed above."""
    names = {}
    for path, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            theirs = _their_module(path, model.config)
            if isinstance(module, CausalConv3d) and not model.config.frame_by_frame:
                theirs += ".conv_1"
            names[f"{path}.{parameter}"] = f"{theirs}.{parameter}"
    return names


def _their_module(path: str, config: MagvitV2Config) -> str:
    half, *rest = path.split(".")
    head = half
    if rest[0] == "levels":
        encoder, place, part = half == "encoder", int(rest[1]), rest[2]
        level = place if encoder else len(config.channel_multipliers) - 1 - place
        if part == "cond_norm":
            return f"{half}.adaptive.{level}.{'gamma' if rest[3] == 'scale' else 'beta'}"
        head = f"{half}.{'down' if encoder else 'up'}.{level}"
        if part in ("down", "up"):
            return f"{head}.{'downsample' if encoder else 'upsample.conv1'}"
        rest = rest[2:]
    names = {"blocks": "block", "mid_blocks": "mid_block"}
    names["shortcut"] = "conv_shortcut" if config.conv_shortcut else "nin_shortcut"
    return ".".join([head, *(names.get(part, part) for part in rest)])


# ---- reading -------------------------------------------------------------------------------------
def _plain(name: str) -> str:
    """A key without its dots and without the word that 3D convolutions put in."""
    return re.sub(r"conv_1(weight|bias)$", r"\1", name.replace(".", ""))


def _count(table: Shapes, pattern: str) -> int:
    """One more than the highest number that the names have there."""
    found = [int(m.group(1)) for name in table if (m := re.match(pattern, name))]
    return 1 + max(found, default=0)


def _select(state: Mapping[str, Tensor], ema: bool | None) -> tuple[dict[str, Tensor], bool]:
    """The keys of the networks or of their running averages, and whether it is the latter."""
    averages = {
        name: value
        for name, value in state.items()
        if name.startswith((f"{_EMA}encoder", f"{_EMA}decoder"))
    }
    if ema and not averages:
        raise ValueError("there are no running averages (keys model_ema.*); pass ema=False")
    if averages and ema is not False:
        return averages, True
    networks = {
        name: value
        for name, value in state.items()
        if not name.startswith(_EMA) and not _IGNORED.match(name)
    }
    return networks, False


def _load(
    checkpoint: object, ema: bool | None, dtype: torch.dtype, changes: Mapping[str, Any]
) -> MagvitV2Tokenizer:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    if isinstance(checkpoint, Mapping):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    _refuse_others(checkpoint)
    state, averaged = _select(tensors_of(checkpoint, "state_dict"), ema)
    head = len(_EMA) if averaged else 0
    config = open_magvit2_config(
        {name[head:]: tuple(v.shape) for name, v in state.items()}, **changes
    )
    with torch.device("meta"):
        model = MagvitV2Tokenizer(config)
    names = open_magvit2_names(model)
    if averaged:
        names = {ours: _EMA + theirs.replace(".", "") for ours, theirs in names.items()}
    flat = config.frame_by_frame
    expected = {}
    for ours, theirs in names.items():
        shape = tuple(model.get_parameter(ours).shape)
        expected[theirs] = shape[:2] + shape[3:] if flat and len(shape) == 5 else shape
    if faults := key_faults(shapes_of(state), expected):
        raise ValueError(f"does not fit Open-MAGVIT2's tokenizer: {'; '.join(faults)}")
    values = {}
    for ours, theirs in names.items():
        value = state[theirs]
        if ours.endswith("cond_norm.scale.bias"):
            value = value.to(torch.promote_types(value.dtype, torch.float32)) - 1
        values[ours] = value.unsqueeze(2) if value.dim() == 4 else value
    fill(model, values, dtype)
    return model.eval()


def _refuse_others(checkpoint: object) -> None:
    if not isinstance(checkpoint, Mapping):
        return
    words = {str(name).split(".")[0] for name in checkpoint}
    if "model_state_dict" in words or "encoder_layers" in words:
        raise ValueError(
            "this is a checkpoint of magvit2-pytorch, whose network (first convolution of 7x7x7, ELU, "
            "squeeze-excitation, RMS norms, attention; no group norms, no adaptive norm) is none that "
            "a MagvitV2Tokenizer can be; compat.magvit2_pytorch.load_magvit2_pytorch loads it as the "
            "package's own VideoTokenizer on our kernels"
        )
