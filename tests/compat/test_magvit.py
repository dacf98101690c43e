"""Reading the release's trees: against stored outputs, and against plain replays of its layout."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.goldens import load_goldens
from torch import Tensor

from magvit_fast.compat.magvit import load_magvit, magvit_config
from magvit_fast.models import (
    Discriminator3D,
    DiscriminatorConfig,
    MagvitTokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)
from magvit_fast.training.losses import r1_penalty

Tree = dict[str, Tensor]


# ---- discriminator: stored outputs of the release ------------------------------------------------
def odd_discriminator() -> tuple[Discriminator3D, dict[str, np.ndarray]]:
    golden = load_goldens("magvit_v1/06_discriminator_odd")
    config = DiscriminatorConfig(
        clip=(5, 9, 7), filters=4, channel_multipliers=(2, 4), pooling="average"
    )
    model = Discriminator3D(config)
    load_magvit(model, {k: v for k, v in golden.items() if k.startswith("param/")})
    return model, golden


def test_the_discriminator_matches_the_release_at_odd_sizes() -> None:
    model, golden = odd_discriminator()
    video = torch.from_numpy(golden["input"]).movedim(-1, 1).requires_grad_()
    logits = model(video)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(logits.sum(), video)
    expected = torch.from_numpy(golden["input_gradient"]).movedim(-1, 1)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_the_gradient_penalty_and_its_gradients_match_the_release() -> None:
    model, golden = odd_discriminator()
    video = torch.from_numpy(golden["input"]).movedim(-1, 1).requires_grad_()
    penalty = r1_penalty(model(video), video)
    assert penalty.item() == pytest.approx(float(golden["r1_penalty_cost1"]), rel=1e-4)
    assert 10 * penalty.item() == pytest.approx(float(golden["r1_penalty_cost10"]), rel=1e-4)
    (10 * penalty).backward()
    # Reading the norms' names through our own parameters: the same layers in another layout.
    places = {
        "Conv_0": model.conv_in, "Conv_1": model.conv_out, "Dense_0": model.dense,
        "Dense_1": model.logit,
        **{
            f"ResBlock_{i}/{path}": layer
            for i, block in enumerate(model.blocks)
            for path, layer in {
                "Conv_0": block.conv_first, "Conv_1": block.conv_skip, "Conv_2": block.conv_last,
            }.items()
        },
    }  # fmt: skip
    compared = 0
    for name, norm in zip(golden["r1_param_grad_names"], golden["r1_param_grad_l2"], strict=True):
        path, kind = str(name).rsplit("/", 1)
        parameter = places[path].weight if kind == "kernel" else places[path].bias
        grad = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert grad.norm().item() == pytest.approx(float(norm), rel=1e-3, abs=1e-6), name
        compared += 1
    assert compared == 18
    first = torch.from_numpy(golden["r1_param_grad/Conv_0/kernel"]).permute(4, 3, 0, 1, 2)
    torch.testing.assert_close(model.conv_in.weight.grad, first, rtol=1e-3, atol=1e-5)
    last = torch.from_numpy(golden["r1_param_grad/Dense_1/kernel"]).T
    torch.testing.assert_close(model.logit.weight.grad, last, rtol=1e-3, atol=1e-5)


# ---- tokenizer: a plain replay of the layout, written from its description -----------------------
class Replay:
    """Runs a tree in the order in which flax numbers it."""

    def __init__(self, tree: Tree, root: str, frame_by_frame: bool, mode: str) -> None:
        self.tree, self.root, self.flat, self.mode = tree, root, frame_by_frame, mode
        self.count: Counter[str] = Counter()

    def next(self, kind: str) -> str:
        self.count[kind] += 1
        return f"{self.root}/{kind}_{self.count[kind] - 1}"

    def conv(self, x: Tensor, path: str) -> Tensor:
        kernel = self.tree[f"{path}/kernel"]
        kernel = kernel.unsqueeze(0) if self.flat else kernel
        pads = [k // 2 for k in reversed(kernel.shape[:3]) for _ in range(2)]
        x = F.pad(x, pads, mode=self.mode)
        return F.conv3d(x, kernel.permute(4, 3, 0, 1, 2), self.tree.get(f"{path}/bias"))

    def norm(self, x: Tensor, path: str) -> Tensor:
        y = x.transpose(1, 2).flatten(0, 1) if self.flat else x
        y = F.group_norm(y, 32, self.tree[f"{path}/scale"], self.tree[f"{path}/bias"], 1e-6)
        if self.flat:
            y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return F.silu(y)

    def block(self, x: Tensor) -> Tensor:
        path = self.next("ResBlock")
        y = self.conv(self.norm(x, f"{path}/GroupNorm_0"), f"{path}/Conv_0")
        y = self.conv(self.norm(y, f"{path}/GroupNorm_1"), f"{path}/Conv_1")
        wide = f"{path}/Conv_2/kernel" in self.tree
        return y + (self.conv(x, f"{path}/Conv_2") if wide else x)

    def encode(self, x: Tensor, times: tuple[bool, ...], blocks: int) -> Tensor:
        x = self.conv(x, self.next("Conv"))
        for i in range(len(times) + 1):
            for _ in range(blocks):
                x = self.block(x)
            if i < len(times):
                x = F.avg_pool3d(x, (1 + times[i], 2, 2))
        for _ in range(blocks):
            x = self.block(x)
        return self.conv(self.norm(x, self.next("GroupNorm")), self.next("Conv"))

    def decode(self, x: Tensor, times: tuple[bool, ...], blocks: int) -> Tensor:
        x = self.conv(x, self.next("Conv"))
        for _ in range(blocks):
            x = self.block(x)
        for i in reversed(range(len(times) + 1)):
            for _ in range(blocks):
                x = self.block(x)
            if i > 0:
                x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
                x = x.repeat_interleave(2, 2) if times[i - 1] else x
                x = self.conv(x, self.next("Conv"))
        return self.conv(self.norm(x, self.next("GroupNorm")), self.next("Conv"))


def tokenizer_tree(f: int, multipliers: tuple[int, ...], blocks: int, flat: bool) -> Tree:
    """Random parameters by the names and shapes of the release."""
    generator = torch.Generator().manual_seed(1)
    tree: Tree = {"quantizer/codebook": torch.randn(16, 6, generator=generator)}
    size = (3, 3) if flat else (3, 3, 3)
    one = (1, 1) if flat else (1, 1, 1)

    def conv(
        path: str, inputs: int, outputs: int, *, bias: bool, kernel: tuple[int, ...] = size
    ) -> None:
        scale = (inputs * math.prod(kernel)) ** -0.5
        tree[f"{path}/kernel"] = torch.randn(*kernel, inputs, outputs, generator=generator) * scale
        if bias:
            tree[f"{path}/bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(path: str, width: int) -> None:
        tree[f"{path}/scale"] = torch.rand(width, generator=generator) + 0.5
        tree[f"{path}/bias"] = torch.randn(width, generator=generator) * 0.1

    def half(
        root: str, widths: list[int], ups: list[int], first: tuple[int, int], last: int
    ) -> None:
        conv(f"{root}/Conv_0", *first, bias=root == "decoder")
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            path = f"{root}/ResBlock_{k}"
            norm(f"{path}/GroupNorm_0", a)
            conv(f"{path}/Conv_0", a, b, bias=False)
            norm(f"{path}/GroupNorm_1", b)
            conv(f"{path}/Conv_1", b, b, bias=False)
            if a != b:
                conv(f"{path}/Conv_2", a, b, bias=False, kernel=one)
        for i, width in enumerate(ups):
            conv(f"{root}/Conv_{i + 1}", width, width, bias=True)
        norm(f"{root}/GroupNorm_0", widths[-1])
        kernel = one if root == "encoder" else size
        conv(f"{root}/Conv_{len(ups) + 1}", widths[-1], last, bias=True, kernel=kernel)

    levels = [f * m for m in multipliers]
    down = [w for w in levels for _ in range(blocks)]
    half("encoder", [f, *down, *[levels[-1]] * blocks], [], (3, f), 6)
    up = [w for w in reversed(levels) for _ in range(blocks)]
    half("decoder", [levels[-1]] * (blocks + 1) + up, levels[:0:-1], (6, levels[-1]), 3)
    return tree


@pytest.mark.parametrize(
    ("architecture", "padding", "mode"),
    [
        ("3dcnn", None, "constant"),
        ("3dcnn", "reflect", "reflect"),
        ("3dcnn", "wrap", "circular"),
        ("2dcnn", None, "constant"),
    ],
)
def test_a_whole_tokenizer_equals_a_replay_of_its_tree(
    architecture: str, padding: str | None, mode: str
) -> None:
    flat, multipliers, blocks = architecture == "2dcnn", (1, 1, 2), 2
    tree = tokenizer_tree(32, multipliers, blocks, flat)
    settings = {
        "filters": 32, "channel_multipliers": multipliers, "num_enc_res_blocks": blocks,
        "num_dec_res_blocks": blocks, "embedding_dim": 6, "codebook_size": 16,
        "temporal_downsample": 1, "custom_conv_padding": padding, "architecture": architecture,
        "norm_type": "GN", "activation_fn": "swish", "conv_downsample": False,
        "entropy_loss_ratio": 0.2, "entropy_loss_type": "softmax", "entropy_temperature": 0.05,
        "commitment_cost": 0.3,
    }  # fmt: skip
    config = magvit_config(settings)
    assert config.temporal_downsample == ((False, False) if flat else (True, False))
    assert (config.entropy_weight, config.temperature, config.commitment_weight) == (0.2, 0.05, 0.3)
    model = MagvitTokenizer(config).eval()
    load_magvit(model, {f"case/param/{k}": v.numpy() for k, v in tree.items()}, "case")
    video = torch.rand(1, 3, 4, 12, 8)
    times = config.temporal_downsample
    with torch.no_grad():
        output = model(video)
        z = Replay(tree, "encoder", flat, mode).encode(video, times, blocks)
        rows = tree["quantizer/codebook"][output.ids].movedim(-1, 1)
        pixels = Replay(tree, "decoder", flat, mode).decode(rows, times, blocks)
    torch.testing.assert_close(output.z, z, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.reconstruction, pixels, atol=5e-5, rtol=1e-5)


# ---- transformer ---------------------------------------------------------------------------------
def transformer_tree(rows: int, positions: int, dim: int, heads: int, layers: int) -> Tree:
    generator = torch.Generator().manual_seed(2)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    tree = {
        "BertEmbed_0/word_embeddings/embedding": values(rows, dim),
        "BertEmbed_0/position_embeddings/embedding": values(positions, dim),
        "BertMlmLayer_0/mlm_bias/bias": values(rows),
        "BertMlmLayer_0/mlm_dense/kernel": values(dim, dim),
        "BertMlmLayer_0/mlm_dense/bias": values(dim),
    }
    norms = ["BertEmbed_0/embeddings_ln", "BertMlmLayer_0/mlm_ln"]
    for i in range(layers):
        head = f"BertLayer_{i}/BertAttention_0"
        for name in ("query", "key", "value"):
            tree[f"{head}/self_attention/{name}/kernel"] = values(dim, heads, dim // heads)
            tree[f"{head}/self_attention/{name}/bias"] = values(heads, dim // heads)
        tree[f"{head}/self_attention/out/kernel"] = values(heads, dim // heads, dim)
        tree[f"{head}/self_attention/out/bias"] = values(dim)
        mlp = f"BertLayer_{i}/BertMlp_0"
        for name, shape in {"intermediate_output": (dim, 24), "layer_output": (24, dim)}.items():
            tree[f"{mlp}/{name}/kernel"] = values(*shape)
            tree[f"{mlp}/{name}/bias"] = values(shape[1])
        norms += [f"{head}/attention_output_ln", f"{mlp}/layer_output_ln"]
    for name in norms:
        tree[f"{name}/scale"], tree[f"{name}/bias"] = 1 + values(dim), values(dim)
    return tree


def replay_bert(tree: Tree, ids: Tensor, layers: int) -> Tensor:
    """Logits over the whole vocabulary; negative ids count from the end of the table."""

    def norm(x: Tensor, path: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tree[f"{path}/scale"], tree[f"{path}/bias"], 1e-12)

    def dense(x: Tensor, path: str) -> Tensor:
        return x @ tree[f"{path}/kernel"] + tree[f"{path}/bias"]

    words = tree["BertEmbed_0/word_embeddings/embedding"]
    x = words[ids] + tree["BertEmbed_0/position_embeddings/embedding"][: ids.shape[1]]
    x = norm(x, "BertEmbed_0/embeddings_ln")
    for i in range(layers):
        head, mlp = f"BertLayer_{i}/BertAttention_0", f"BertLayer_{i}/BertMlp_0"
        q, k, v = (
            torch.einsum("bnd,dhs->bhns", x, tree[f"{head}/self_attention/{n}/kernel"])
            + tree[f"{head}/self_attention/{n}/bias"].unsqueeze(1)
            for n in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        out = torch.einsum("bhns,hsd->bnd", weights @ v, tree[f"{head}/self_attention/out/kernel"])
        out = out + tree[f"{head}/self_attention/out/bias"]
        x = norm(out + x, f"{head}/attention_output_ln")
        hidden = F.gelu(dense(x, f"{mlp}/intermediate_output"), approximate="tanh")
        x = norm(dense(hidden, f"{mlp}/layer_output") + x, f"{mlp}/layer_output_ln")
    x = norm(
        F.gelu(dense(x, "BertMlmLayer_0/mlm_dense"), approximate="tanh"), "BertMlmLayer_0/mlm_ln"
    )
    return x @ words.T + tree["BertMlmLayer_0/mlm_bias/bias"]


@pytest.mark.parametrize("multi_task", [True, False])
def test_a_whole_transformer_equals_a_replay_of_its_tree(multi_task: bool) -> None:
    prompts = ("full_generation", "outpainting", "frame_prediction") if multi_task else ()
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=2, num_heads=2, mlp_size=24, grid=(2, 2, 2), num_subtokens=1,
        subtoken_size=8, num_classes=3, prompts=prompts,
    )  # fmt: skip
    rows = 8 + 3 + 1 + (16 if multi_task else 1)
    tree = transformer_tree(rows, 12, 16, 2, 2)
    model = MaskedTransformer(config).eval()
    load_magvit(model, {f"param/{k}": v.numpy() for k, v in tree.items()})
    tokens, mask = torch.randint(0, 8, (2, 8)), torch.rand(2, 8) < 0.5
    classes = torch.tensor([2, 3])  # the second is "unconditional"
    prefix = [8 + classes]
    for name, row in (
        (("outpainting", -6), ("frame_prediction", -4)) if multi_task else ((None, 0),)
    ):
        sequence = torch.cat(
            [
                torch.stack(([torch.full((2,), row)] if multi_task else []) + prefix, 1),
                tokens.masked_fill(mask, -1),
            ],
            1,
        )
        with torch.no_grad():
            expected = replay_bert(tree, sequence, 2)[:, config.prefix_length :, :8]
            prompt = model.prompt_id(name) if name else None
            logits = model(tokens, mask, class_id=classes, prompt_id=prompt).squeeze(2)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("multi_task", [True, False])
def test_the_prefix_condition_equals_a_replay_of_its_tree(multi_task: bool) -> None:
    """[class][condition tokens][SEP][tokens]; with one special row SEP = -2 is "no class"."""
    prompts = ("frame_prediction",) if multi_task else ()
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=2, num_heads=2, mlp_size=24, grid=(2, 2, 2), num_subtokens=1,
        subtoken_size=8, num_classes=3, prompts=prompts, condition_tokens=4,
    )  # fmt: skip
    rows = 8 + 3 + 1 + (16 if multi_task else 1)
    tree = transformer_tree(rows, 16, 16, 2, 2)
    model = MaskedTransformer(config).eval()
    load_magvit(model, {f"param/{k}": v.numpy() for k, v in tree.items()})
    tokens, mask = torch.randint(0, 8, (2, 8)), torch.rand(2, 8) < 0.5
    given, separator = torch.randint(0, 8, (2, 4)), torch.full((2, 1), -2)
    head = [torch.full((2, 1), -4)] if multi_task else []
    classes = torch.tensor([[8 + 1], [8 + 3]])
    sequence = torch.cat([*head, classes, given, separator, tokens.masked_fill(mask, -1)], 1)
    assert config.prefix_length == sequence.shape[1] - 8
    with torch.no_grad():
        expected = replay_bert(tree, sequence, 2)[:, config.prefix_length :, :8]
        prompt = 0 if multi_task else None
        logits = model(
            tokens, mask, class_id=torch.tensor([1, 3]), prompt_id=prompt, condition=given
        )
    torch.testing.assert_close(logits.squeeze(2), expected, atol=2e-5, rtol=1e-5)
    assert (model.separator_embedding is None) == (not multi_task)


# ---- what cannot be read -------------------------------------------------------------------------
def test_bad_trees_and_settings_are_named() -> None:
    model = MagvitTokenizer(
        magvit_config(
            {
                "filters": 32,
                "channel_multipliers": (1, 1, 2),
                "embedding_dim": 6,
                "codebook_size": 16,
            }
        )
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tree = tokenizer_tree(32, (1, 1, 2), 2, flat=False)

    def fails(change: Tree, drop: str, message: str) -> None:
        bad = {k: v for k, v in (tree | change).items() if k != drop}
        with pytest.raises(ValueError, match=message):
            load_magvit(model, bad)

    fails({}, "encoder/Conv_0/kernel", r"1 parameter\(s\) missing: encoder/Conv_0/kernel")
    fails({"encoder/Conv_9/kernel": torch.zeros(3)}, "", "have no place: encoder/Conv_9")
    fails(
        {"quantizer/codebook": torch.zeros(15, 6)}, "", r"quantizer.codebook would get .*\(15, 6\)"
    )
    fails({"encoder/Conv_1/bias": torch.full((6,), torch.nan)}, "", "not finite")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match="Linear has no counterpart"):
        load_magvit(torch.nn.Linear(1, 1), tree)  # type: ignore[arg-type]
    for settings, message in (
        ({"norm_type": "LN"}, "norm_type 'LN' is not supported"),
        ({"architecture": "2plus1dcnn"}, "architecture"),
        ({"custom_conv_padding": "linear_ramp"}, "custom_conv_padding"),
        ({"num_enc_res_blocks": 3}, "as many encoder as decoder"),
        ({"filterz": 3}, "filterz unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            magvit_config(settings)


def test_transformers_that_do_not_fit_are_named() -> None:
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=24, grid=(2, 2, 2), num_subtokens=1,
        subtoken_size=8, prompts=("inpainting",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="word_embeddings has 10 rows, expected at least 8 codes"):
        load_magvit(MaskedTransformer(config), transformer_tree(10, 10, 16, 2, 1))
    two = MaskedTransformerConfig(hidden_size=16, num_layers=1, num_heads=2, mlp_size=24)
    with pytest.raises(ValueError, match="one table of codes, got 2"):
        load_magvit(MaskedTransformer(two), transformer_tree(30, 10, 16, 2, 1))
