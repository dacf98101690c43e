"""Weights of the MAGVIT release (JAX, flax parameter trees) for our modules.

    model = MagvitTokenizer(magvit_config(settings))     # settings: the release's `config.vqvae`
    load_magvit(model, {path: array})                    # also Discriminator3D, MaskedTransformer

Paths are those of the flax tree joined by "/", as in `encoder/ResBlock_3/Conv_0/kernel`, often
stored under `param/` or `<case>/param/`. flax numbers the layers of a class within their parent in
the order in which they are made. The rules:

    kernel of a convolution (kT, kH, kW, in, out)   weight [out, in, kT, kH, kW]; the 2D tokenizer's
                                                    (kH, kW, in, out) get kT = 1
    kernel of a dense layer (in, out)               weight [out, in]
    scale, bias                                     weight, bias
    ResBlock_k                                      GroupNorm_0, Conv_0, GroupNorm_1, Conv_1, and
                                                    Conv_2 = the shortcut where there is one
    encoder: Conv_0 first, Conv_1 last; ResBlock_k  blocks of all levels in order, then the final ones
    decoder: Conv_0 first, then the up-samplers'    blocks beside the latent, then the levels,
      in the order of execution, the last is last   deepest first
    quantizer/codebook                              unchanged
    discriminator: ResBlock_i/Conv_1 is the skip    Conv_0 first and Conv_1 last outside the blocks;
                                                    Dense_0 takes (t, h, w, c) flattened
    BertEmbed_0/word_embeddings/embedding           rows: codes, classes, "unconditional", special
                                                    tokens; the latter count from the end: MASK -1,
                                                    SEP -2, full generation -3, frame prediction -4,
                                                    frame interpolation -5, outpainting and
                                                    inpainting -6 (with the release's correction
                                                    flag inpainting -7); a single-task model has
                                                    MASK only, and SEP is then "unconditional"
    BertEmbed_0/position_embeddings/embedding       rows beyond our sequence are left out
    BertLayer_i/BertAttention_0/self_attention      query, key, value (hidden, heads, size) become
                                                    one matrix; out (heads, size, hidden)
    BertMlmLayer_0/mlm_bias/bias                    one a row; ours has those of the codes alone

The rows of special tokens that no prompt of the model uses are left out, and so are output biases
beyond the codes: nothing that our model computes depends on them. All rules are linear and without
an offset: a tree of gradients can be read into a second model and compared parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from magvit_fast.compat._arrays import few, select
from magvit_fast.models.discriminator import Discriminator3D
from magvit_fast.models.magvit import MagvitConfig, MagvitTokenizer
from magvit_fast.models.masked_transformer import MaskedTransformer, MaskedTransformerConfig

State = dict[str, Tensor]

# Special tokens of the release by the names of our prompts: a task's own or one it shares. The
# inpainting tasks have a token of their own (-7), but the released configs use that of outpainting
# unless a flag corrects it.
SPECIAL_TOKENS = {
    "mask": -1,
    "separator": -2,
    "full_generation": -3,
    "class_generation": -3,
    "frame_prediction": -4,
    "class_frame_prediction": -4,
    "frame_interpolation": -5,
    "outpainting": -6,
    "outpainting_central": -6,
    "outpainting_vertical": -6,
    "outpainting_horizontal": -6,
    "outpainting_dynamic": -6,
    "inpainting": -6,
    "inpainting_central": -6,
    "inpainting_dynamic": -6,
}
INPAINTING_PATCHED = -7

# Modes of np.pad. One cell, all that a kernel of 3 needs, is the same for "symmetric" as for "edge".
_PAD_MODES = {
    None: "zeros",
    "constant": "zeros",
    "reflect": "reflect",
    "edge": "replicate",
    "symmetric": "replicate",
    "wrap": "circular",
}
_FIELDS = {
    "filters": "filters",
    "codebook_size": "codebook_size",
    "embedding_dim": "embedding_dim",
    "commitment_cost": "commitment_weight",
    "embedding_loss_ratio": "codebook_weight",
    "entropy_loss_ratio": "entropy_weight",
    "entropy_temperature": "temperature",
    "entropy_loss_type": "entropy_kind",
}
# Settings that must have this value, for there is no other way here.
_FIXED = {
    "norm_type": "GN",
    "activation_fn": "swish",
    "conv_downsample": False,
    "upsample": "nearest+conv",
    "vector_quantizer_class": "VectorQuantizer",
    "latent_normalize": False,
}


def magvit_config(settings: Mapping[str, Any], **changes: Any) -> MagvitConfig:
    """The config of a tokenizer of the release from its settings (`config.vqvae` there).

    Settings that are missing keep the values of MAGVIT-B. `custom_conv_padding` of the 2D tokenizer
    is ignored, as in the release (which reads another name for its encoder and none for its
    decoder). changes: fields of the result that differ.

    Raises:
        ValueError: a setting that is unknown or has a value that is not supported.
    """
    given = dict(settings)
    flat = given.pop("architecture", "3dcnn")
    if flat not in ("3dcnn", "2dcnn"):
        raise ValueError(f"settings: architecture {flat!r} is not supported, only 3dcnn and 2dcnn")
    for name in ("num_enc_remat_blocks", "num_dec_remat_blocks"):  # memory, not the model
        given.pop(name, None)
    for name, value in _FIXED.items():
        if (got := given.pop(name, value)) != value:
            raise ValueError(f"settings: {name} {got!r} is not supported, only {value!r}")
    multipliers = tuple(given.pop("channel_multipliers", (1, 2, 2, 4)))
    blocks = {given.pop(f"num_{half}_res_blocks", 2) for half in ("enc", "dec")}
    if len(blocks) > 1:
        raise ValueError("settings: expected as many encoder as decoder res blocks")
    down = given.pop("temporal_downsample", 2 if flat == "3dcnn" else 0)
    levels = len(multipliers) - 1
    # An int counts the shallow levels that halve time.
    halves = tuple(i < down for i in range(levels)) if isinstance(down, int) else tuple(down)
    padding = given.pop("custom_conv_padding", None)
    if padding not in _PAD_MODES:
        raise ValueError(f"settings: custom_conv_padding {padding!r} is not supported")
    if unknown := sorted(set(given) - set(_FIELDS)):
        raise ValueError(f"settings: {', '.join(unknown)} unknown")
    fields: dict[str, Any] = {
        "channel_multipliers": multipliers,
        "num_res_blocks": blocks.pop(),
        "temporal_downsample": halves if flat == "3dcnn" else (False,) * levels,
        "pad_mode": _PAD_MODES[padding] if flat == "3dcnn" else "zeros",
        "frame_by_frame": flat == "2dcnn",
    }
    fields |= {_FIELDS[key]: value for key, value in given.items()}
    return MagvitConfig(**{**fields, **changes})


@torch.no_grad()
def load_magvit(
    module: MagvitTokenizer | Discriminator3D | MaskedTransformer,
    arrays: Mapping[str, NDArray[Any] | Tensor],
    prefix: str = "",
    *,
    patched_inpainting: bool = False,
) -> None:
    """Fill `module` with the release's parameters, in place.

    Args:
        module: what the tree is of. A tokenizer's tree has encoder/, decoder/ and quantizer/.
        arrays: path -> array, any float dtype (an open npz file will do).
        prefix: what comes before or after `param/`, such as a case name.
        patched_inpainting: a transformer's inpainting prompts take the row -7 in place of -6.

    Raises:
        ValueError: a parameter is missing, left over, not finite or of the wrong shape; nothing has
            been changed then.
        TypeError: the module has no counterpart in the release.
    """
    tree = _Tree(select(arrays, prefix))
    state: State = {}
    if isinstance(module, MaskedTransformer):
        _read_transformer(module, tree, state, patched_inpainting)
    else:
        _read_module(module, tree, state)
    tree.check_used()
    parameters = dict(module.named_parameters())
    for name, target in parameters.items():
        if state[name].shape != target.shape:
            raise ValueError(
                f"arrays: {name} would get shape {tuple(state[name].shape)}, "
                f"expected {tuple(target.shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"arrays: the values for {name} are not finite")
    for name, target in parameters.items():
        target.copy_(state[name])


class _Tree:
    """The arrays of one tree; remembers which were used and which were missed."""

    def __init__(self, arrays: Mapping[str, NDArray[Any] | Tensor]) -> None:
        self.arrays = arrays
        self.used: set[str] = set()
        self.missing: list[str] = []

    def take(self, path: str) -> Tensor:
        self.used.add(path)
        if path not in self.arrays:
            self.missing.append(path)
            return torch.zeros(())
        raw = self.arrays[path]
        value = raw.detach().cpu().numpy() if isinstance(raw, Tensor) else np.asarray(raw)
        return torch.from_numpy(np.array(value, dtype=np.float32))

    def check_used(self) -> None:
        if self.missing:
            raise ValueError(
                f"arrays: {len(self.missing)} parameter(s) missing: {few(sorted(self.missing))}"
            )
        if extra := sorted(set(self.arrays) - self.used):
            raise ValueError(f"arrays: {len(extra)} parameter(s) have no place: {few(extra)}")


def _kernel(value: Tensor) -> Tensor:
    if value.dim() == 4:  # a 2D convolution
        value = value.unsqueeze(0)
    return value.permute(4, 3, 0, 1, 2) if value.dim() == 5 else value.T


def _layer(tree: _Tree, path: str, state: State, name: str, layer: nn.Module) -> None:
    """A convolution, dense layer or norm."""
    weight = layer.get_parameter("weight")
    if weight.dim() > 1:
        value = tree.take(f"{path}/kernel")
        state[f"{name}.weight"] = _kernel(value) if value.dim() > 1 else value
    else:
        state[f"{name}.weight"] = tree.take(f"{path}/scale")
    if getattr(layer, "bias", None) is not None:
        state[f"{name}.bias"] = tree.take(f"{path}/bias")


def _read_module(module: nn.Module, tree: _Tree, state: State) -> None:
    if isinstance(module, MagvitTokenizer):
        _read_half(module, "encoder", tree, state)
        _read_half(module, "decoder", tree, state)
        state["quantizer.codebook"] = tree.take("quantizer/codebook")
    elif isinstance(module, Discriminator3D):
        _read_discriminator(module, tree, state)
    else:
        raise TypeError(f"module: {type(module).__name__} has no counterpart in the release")


def _read_half(model: MagvitTokenizer, half: str, tree: _Tree, state: State) -> None:
    """Encoder or decoder: residual blocks and convolutions in the order of execution."""
    module = model.get_submodule(half)

    def read(path: str, name: str) -> None:
        _layer(tree, f"{half}/{path}", state, f"{half}.{name}", module.get_submodule(name))

    levels = [f"levels.{i}" for i in range(len(model.config.channel_multipliers))]
    places = [f"{level}.blocks" for level in levels]
    places = [*places, "mid_blocks"] if half == "encoder" else ["mid_blocks", *places]
    blocks = [f"{p}.{j}" for p in places for j in range(model.config.num_res_blocks)]
    for k, name in enumerate(blocks):
        parts = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2"}
        parts["Conv_1"] = "conv2"
        if module.get_submodule(name).shortcut is not None:
            parts["Conv_2"] = "shortcut"
        for path, part in parts.items():
            read(f"ResBlock_{k}/{path}", f"{name}.{part}")
    ups = [f"{level}.up.conv" for level in levels[:-1]] if half == "decoder" else []
    for i, name in enumerate(["conv_in", *ups, "conv_out"]):
        read(f"Conv_{i}", name)
    read("GroupNorm_0", "norm_out")


def _read_discriminator(model: Discriminator3D, tree: _Tree, state: State) -> None:
    layers = {"Conv_0": "conv_in", "Conv_1": "conv_out", "Dense_0": "dense", "Dense_1": "logit"}
    for i in range(len(model.blocks)):
        parts = {"Conv_0": "conv_first", "Conv_1": "conv_skip", "Conv_2": "conv_last"}
        layers |= {f"ResBlock_{i}/{path}": f"blocks.{i}.{part}" for path, part in parts.items()}
    for path, name in layers.items():
        _layer(tree, path, state, name, model.get_submodule(name))


def _read_transformer(
    model: MaskedTransformer, tree: _Tree, state: State, patched_inpainting: bool
) -> None:
    config = model.config
    if config.num_subtokens != 1:
        raise ValueError(
            f"module: the release has one table of codes, got {config.num_subtokens} sub-tokens"
        )
    words = tree.take("BertEmbed_0/word_embeddings/embedding")
    positions = tree.take("BertEmbed_0/position_embeddings/embedding")
    state["position_embedding"] = positions[: config.prefix_length + config.num_tokens]
    if words.dim() == 2:
        state |= _split_rows(words, config, patched_inpainting)
    _layer(tree, "BertEmbed_0/embeddings_ln", state, "embedding_norm", model.embedding_norm)
    for i in range(config.num_layers):
        _read_bert_layer(model, i, tree, state)
    head = model.get_submodule("heads.0")
    for path, name in {"mlm_dense": "dense", "mlm_ln": "norm"}.items():
        layer = head.get_submodule(name)
        _layer(tree, f"BertMlmLayer_0/{path}", state, f"heads.0.{name}", layer)
    state["heads.0.bias"] = tree.take("BertMlmLayer_0/mlm_bias/bias")[: config.subtoken_size]


def _split_rows(words: Tensor, config: MaskedTransformerConfig, patched: bool) -> State:
    """The one table of the release as ours: codes, classes with "unconditional", prompts, MASK."""
    codes, classes = config.subtoken_size, config.num_classes + 1
    rows = {name: SPECIAL_TOKENS.get(name) for name in config.prompts}
    if patched:
        rows |= {name: INPAINTING_PATCHED for name in rows if name.startswith("inpainting")}
    if unknown := [name for name, row in rows.items() if row is None]:
        raise ValueError(f"module: prompts {', '.join(unknown)} have no row in the release")
    special = max([1, *(-row for row in rows.values() if row is not None)])
    if len(words) < codes + classes + special:
        raise ValueError(
            f"arrays: word_embeddings has {len(words)} rows, expected at least {codes} codes, "
            f"{classes} classes (with the unconditional one) and {special} special tokens"
        )
    state = {
        "token_embedding.weight": words[:codes].unsqueeze(0),
        "token_embedding.mask_embedding": words[-1],
        "class_embedding.weight": words[codes : codes + classes],
    }
    if rows and config.condition_tokens:
        state["separator_embedding"] = words[SPECIAL_TOKENS["separator"]].unsqueeze(0)
    if rows:
        state["prompt_embedding.weight"] = torch.stack(
            [words[row] for row in rows.values() if row is not None]
        )
    return state


def _read_bert_layer(model: MaskedTransformer, index: int, tree: _Tree, state: State) -> None:
    dim, ours, theirs = model.config.hidden_size, f"layers.{index}", f"BertLayer_{index}"
    attention = f"{theirs}/BertAttention_0/self_attention"
    kernels = [tree.take(f"{attention}/{n}/kernel") for n in ("query", "key", "value")]
    biases = [tree.take(f"{attention}/{n}/bias") for n in ("query", "key", "value")]
    if all(k.dim() == 3 for k in kernels):
        state[f"{ours}.attention.qkv.weight"] = torch.cat([k.flatten(1).T for k in kernels])
        state[f"{ours}.attention.qkv.bias"] = torch.cat([b.flatten() for b in biases])
    out = tree.take(f"{attention}/out/kernel")
    state[f"{ours}.attention.out.weight"] = out.reshape(-1, dim).T if out.dim() == 3 else out
    state[f"{ours}.attention.out.bias"] = tree.take(f"{attention}/out/bias")
    for path, name in {
        "BertAttention_0/attention_output_ln": "attention_norm",
        "BertMlp_0/intermediate_output": "mlp_in",
        "BertMlp_0/layer_output": "mlp_out",
        "BertMlp_0/layer_output_ln": "mlp_norm",
    }.items():
        layer = model.get_submodule(f"{ours}.{name}")
        _layer(tree, f"{theirs}/{path}", state, f"{ours}.{name}", layer)
