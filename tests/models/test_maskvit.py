"""MaskViT's transformer: its windows, what they see, its sizes, and what it says about bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast.models import MaskViTConfig, MaskViTTransformer
from magvit_fast.nn.transformer import PreNormLayer
from magvit_fast.nn.windows import from_windows, to_windows

TINY = MaskViTConfig(
    frames=3, grid=(4, 4), codebook_size=8, hidden_size=16, num_blocks=2, num_heads=2, mlp_size=32,
    window=(2, 2),
)  # fmt: skip
FULL = dataclasses.replace(TINY, attention="full")


def tiny(config: MaskViTConfig = TINY, seed: int = 0) -> MaskViTTransformer:
    """A model whose layers do much: weights of deviation 0.3 in place of 0.02."""
    torch.manual_seed(seed)
    model = MaskViTTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def tokens(config: MaskViTConfig = TINY, batch: int = 2, frames: int | None = None):
    generator = torch.Generator().manual_seed(3)
    shape = (batch, config.frames if frames is None else frames, *config.grid)
    ids = torch.randint(0, config.codebook_size, shape, generator=generator)
    return ids, torch.rand(shape, generator=generator) < 0.5


def tile_numbers(size: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """Number of the tile of each position [T, h, w], by division."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    return (t // window[0]) * 10000 + (h // window[1]) * 100 + w // window[2]


def masked_attention_layer(layer: PreNormLayer, x: Tensor, allowed: Tensor) -> Tensor:
    """A PreNormLayer over the whole sequence [B, N, D], spelled out, with a mask [N, N]."""
    heads = layer.attention.num_heads
    y = layer.attention_norm(x)
    q, k, v = layer.attention.qkv(y).chunk(3, dim=-1)
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    x = x + layer.attention.out((p @ v).transpose(1, 2).flatten(2))
    hidden = F.gelu(layer.mlp_in(layer.mlp_norm(x)), approximate="tanh")
    return x + layer.mlp_out(hidden)


def test_windows_on_a_hand_worked_example() -> None:
    x = torch.arange(2 * 2 * 4).view(1, 2, 2, 4, 1)
    assert to_windows(x, (2, 1, 2)).squeeze(-1).tolist() == [
        [0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15],
    ]  # fmt: skip
    for window in ((1, 2, 4), (2, 2, 2), (2, 1, 1), (2, 2, 4)):
        assert torch.equal(from_windows(to_windows(x, window), (2, 2, 4), window), x)


@pytest.mark.parametrize("order", ["sw_stw", "stw_sw"])
@pytest.mark.parametrize("window", [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("frames", [1, 3])
def test_window_attention_equals_full_attention_with_a_mask(order, window, frames) -> None:
    config = dataclasses.replace(TINY, order=order, window=window)
    model = tiny(config)
    ids, unknown = tokens(frames=frames)
    size = (frames, *config.grid)
    spatial, tiles = (1, *config.grid), (frames, *window)
    x = F.embedding(ids, model.token_embedding.weight[0])
    x = torch.where(unknown.unsqueeze(-1), model.token_embedding.mask_embedding, x)
    x = x + model.spatial_embedding + model.temporal_embedding[:frames, None, None]
    x = x.flatten(1, 3)
    for index, layer in enumerate(model.layers):
        first = order == "sw_stw"
        numbers = tile_numbers(size, spatial if (index % 2 == 0) == first else tiles).flatten()
        x = masked_attention_layer(layer, x, numbers[:, None] == numbers)
    expected = model.output_norm(x) @ model.token_embedding.weight[0].T + model.output_bias
    got = model(ids, unknown).flatten(1, 3)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def reached(model: MaskViTTransformer, layers: slice, at: tuple[int, int, int]) -> Tensor:
    """bool [T, h, w]: the logits that change when the token at `at` does, with some layers only."""
    model.layers = model.layers[layers]
    ids, _ = tokens(model.config, batch=1)
    unknown = torch.zeros(ids.shape, dtype=torch.bool)
    other = ids.clone()
    other[(0, *at)] = (ids[(0, *at)] + 1) % model.config.codebook_size
    with torch.no_grad():
        return (model(ids, unknown) != model(other, unknown))[0].any(-1)


def test_a_token_reaches_its_window_and_no_other() -> None:
    at, size = (1, 2, 1), (3, *TINY.grid)
    frame = tile_numbers(size, (1, 4, 4))
    tile = tile_numbers(size, (3, 2, 2))
    assert torch.equal(reached(tiny(), slice(0, 1), at), frame == frame[at])
    swapped = tiny(dataclasses.replace(TINY, order="stw_sw"))
    assert torch.equal(reached(swapped, slice(0, 1), at), tile == tile[at])
    assert reached(tiny(), slice(0, 2), at).all()  # one block joins everything
    assert reached(tiny(FULL), slice(0, 1), at).all()


def test_full_attention_is_one_window() -> None:
    one, other = tiny(FULL), tiny(dataclasses.replace(TINY, window=(4, 4)))
    assert [one.config.layer_window(i, 2) for i in range(2)] == [(2, 4, 4)] * 2
    assert [other.config.layer_window(i, 2) for i in range(2)] == [(1, 4, 4), (2, 4, 4)]
    ids, unknown = tokens(frames=1)  # one frame: the same windows
    torch.testing.assert_close(one(ids, unknown), other(ids, unknown))


def test_only_positions_tell_permuted_tokens_apart() -> None:
    """Without the position tables full attention commutes with any permutation of the tokens."""
    model = tiny(FULL)
    with torch.no_grad():
        model.spatial_embedding.zero_()
        model.temporal_embedding.zero_()
    ids, unknown = tokens()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    moved = (v.flatten(1)[:, order].view_as(v) for v in (ids, unknown))
    expected = model(ids, unknown).flatten(1, 3)[:, order]
    torch.testing.assert_close(model(*moved).flatten(1, 3), expected, atol=2e-5, rtol=2e-5)


def test_clips_can_be_shorter_and_batches_empty() -> None:
    model = tiny()
    ids, unknown = tokens(frames=2)
    shorter = tiny(dataclasses.replace(TINY, frames=2))
    state = model.state_dict()
    state["temporal_embedding"] = state["temporal_embedding"][:2]
    shorter.load_state_dict(state)
    assert torch.equal(model(ids, unknown), shorter(ids, unknown))
    assert model(ids[:0], unknown[:0]).shape == (0, 2, 4, 4, 8)


def test_unknown_ids_are_invisible_and_known_ones_are_not() -> None:
    model = tiny()
    ids, unknown = tokens()
    logits = model(ids, unknown)
    assert logits.shape == (2, 3, 4, 4, 8)
    assert torch.equal(logits, model(torch.where(unknown, 7 - ids, ids), unknown))
    assert not torch.equal(logits, model(torch.where(unknown, ids, 7 - ids), unknown))


def test_actions_are_added_to_the_tokens_of_their_frame() -> None:
    model = tiny(dataclasses.replace(TINY, action_dim=5))
    ids, unknown = tokens()
    actions = torch.randn(2, 3, 5)
    plain = tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "action" not in k})
    with torch.no_grad():
        model.action_projection.weight.zero_()
        model.action_projection.bias.normal_()
        plain.spatial_embedding += model.action_projection.bias
    torch.testing.assert_close(model(ids, unknown, actions=actions), plain(ids, unknown))
    # one layer of windows of a frame: an action reaches its own frame alone
    other = tiny(dataclasses.replace(TINY, action_dim=5))
    other.layers = other.layers[:1]
    changed = actions.clone()
    changed[:, 1] += 1.0
    with torch.no_grad():
        different = other(ids, unknown, actions=actions) != other(ids, unknown, actions=changed)
    assert different.flatten(2).any(2).tolist() == [[False, True, False]] * 2


def layer_weights(model: nn.Module) -> int:
    layers = model.layers  # type: ignore[union-attr]
    return sum(p.numel() for p in layers.parameters() if p.dim() > 1)  # type: ignore[union-attr]


def test_parameter_counts() -> None:
    for name, width, millions in (("maskvit-base", 768, 85), ("maskvit-large", 1024, 151)):
        with torch.device("meta"):
            model = MaskViTTransformer.from_preset(name)
        assert len(model.layers) == 12
        assert layer_weights(model) == 12 * 12 * width**2
        assert round(layer_weights(model) / 1e6) == millions
        vectors = 12 * (3 * width + width + 4 * width + width + 4 * width)
        tables = (1024 + 1 + 256 + 16) * width + 1024 + 2 * width
        assert sum(p.numel() for p in model.parameters()) == 144 * width**2 + vectors + tables


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny(dataclasses.replace(TINY, action_dim=2))
    ids, unknown = tokens()
    model(ids, unknown, actions=torch.randn(2, 3, 2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradient_of_the_windows_in_float64() -> None:
    model = tiny(dataclasses.replace(TINY, hidden_size=4, num_blocks=1, mlp_size=4)).double()
    ids, unknown = tokens(batch=1, frames=2)

    def logits(spatial: Tensor) -> Tensor:
        replaced = {"spatial_embedding": spatial}
        out: Tensor = torch.func.functional_call(model, replaced, (ids, unknown))
        return out.sum((0, 1, 2))

    start = model.spatial_embedding.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(logits, (start,))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids, unknown = tokens()
    gradients = []
    for enabled in (False, True):
        model = MaskViTTransformer(dataclasses.replace(TINY, dropout=0.1))
        model.load_state_dict(tiny().state_dict())
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(5)
        model(ids, unknown).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_step_in_bfloat16() -> None:
    model = tiny(dataclasses.replace(TINY, action_dim=2)).train()
    ids, unknown = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, unknown, actions=torch.randn(2, 3, 2))
    loss = F.cross_entropy(logits.float().flatten(0, 3), ids.flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert model.bfloat16().eval()(ids, unknown, actions=torch.randn(2, 3, 2)).dtype == (
        torch.bfloat16
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["maskvit-base", "maskvit-large"])
def test_the_published_models_train_a_step_in_bfloat16(preset: str) -> None:
    torch.manual_seed(0)
    model = MaskViTTransformer.from_preset(preset, frames=2)
    model.set_gradient_checkpointing()
    ids, unknown = tokens(model.config, batch=1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, unknown)
        loss = F.cross_entropy(logits.float()[unknown], ids[unknown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_a_tiny_model_overfits_a_tiny_batch() -> None:
    torch.manual_seed(0)
    model = MaskViTTransformer(dataclasses.replace(TINY, hidden_size=32))
    ids, unknown = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(ids, unknown)[unknown], ids[unknown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < math.log(8)


def test_a_stored_model_comes_back(tmp_path: Path) -> None:
    model = tiny(dataclasses.replace(TINY, order="stw_sw"))
    model.save_pretrained(tmp_path / "model")
    again = MaskViTTransformer.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(*tokens()), model(*tokens()))
    made = MaskViTTransformer.from_preset("maskvit-base", num_blocks=1, hidden_size=8, mlp_size=8)
    assert made.config.grid == (16, 16)


def test_fullgraph_compile() -> None:
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tokens()), model(*tokens()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (3, 2)}, r"window: expected a tile that divides the grid \(4, 4\), got \(3, 2"),
        ({"window": (2,)}, "window: expected two positive ints"),
        ({"grid": (4, 0)}, "grid: expected two positive ints"),
        ({"codebook_size": 1000}, "codebook_size: expected a power of two, got 1000"),
        ({"num_heads": 3}, "num_heads: expected a divisor of hidden_size 16, got 3"),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"action_dim": -1}, "action_dim"),
        ({"order": "sw"}, "order: expected one of"),
        ({"attention": "axial"}, "attention: expected one of"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_config(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]


def test_bad_inputs_name_the_argument() -> None:
    model, (ids, unknown) = tiny(), tokens()
    with pytest.raises(TypeError, match="ids: expected int64"):
        model(ids.int(), unknown)
    with pytest.raises(TypeError, match="ids: expected a Tensor, got list"):
        model(ids.tolist(), unknown)
    with pytest.raises(ValueError, match=r"ids: expected \[B, T, 4, 4\], got \(2, 3, 16\)"):
        model(ids.flatten(2), unknown)
    with pytest.raises(ValueError, match=r"ids: expected 1 to 3 frames .*got 6"):
        model(ids.repeat(1, 2, 1, 1), unknown.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match=r"unknown: expected bool \(2, 3, 4, 4\)"):
        model(ids, unknown.float())
    with pytest.raises(ValueError, match="unknown: expected bool"):
        model(ids, unknown[:, :1])
    with pytest.raises(ValueError, match=r"ids: expected values in \[0, 8\)"):
        model(ids + 8, torch.zeros_like(unknown))
    with pytest.raises(ValueError, match="actions: expected None for a model with action_dim 0"):
        model(ids, unknown, actions=torch.zeros(2, 3, 2))
    acting = tiny(dataclasses.replace(TINY, action_dim=2))
    with pytest.raises(ValueError, match=r"actions: expected \(2, 3, 2\) for this model, got None"):
        acting(ids, unknown)
    with pytest.raises(ValueError, match=r"actions: expected \(2, 3, 2\), got \(2, 2, 2\)"):
        acting(ids, unknown, actions=torch.zeros(2, 2, 2))
    with pytest.raises(TypeError, match="actions: expected a floating-point dtype"):
        acting(ids, unknown, actions=torch.zeros(2, 3, 2, dtype=torch.int64))
