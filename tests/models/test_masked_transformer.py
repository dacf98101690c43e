from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from magvit_fast.models.masked_transformer import MaskedTransformer, MaskedTransformerConfig
from magvit_fast.nn.embedding import pack_subtokens, unpack_subtokens
from magvit_fast.nn.transformer import PostNormLayer
from magvit_fast.tasks import commit_loss, commit_mask

TINY = MaskedTransformerConfig(
    hidden_size=32, num_layers=2, num_heads=4, mlp_size=64, grid=(2, 2, 3), subtoken_size=8,
    num_classes=3, dropout=0.0,
)  # fmt: skip


def count(config: MaskedTransformerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedTransformer(config).parameters())


def tiny_batch(
    config: MaskedTransformerConfig = TINY, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 2**config.num_bits, (batch, config.num_tokens), generator=generator)
    return tokens, torch.rand(tokens.shape, generator=generator) < 0.5


def test_parameter_counts_of_the_published_models() -> None:
    video = MaskedTransformerConfig(num_classes=101)
    assert count(video) == 306_881_536  # 306.88M: 1281 positions, 101 classes
    image = dataclasses.replace(video, num_classes=1000, grid=(1, 16, 16))
    assert count(image) == 306_753_536  # 306.75M: 257 positions, 1000 classes
    one_head = {"num_subtokens": 1, "subtoken_size": 1024, "grid": (4, 16, 16)}
    assert round(count(dataclasses.replace(video, **one_head)) / 1e6, 1) == 305.6
    base = dataclasses.replace(
        video, **one_head, hidden_size=768, num_layers=12, num_heads=12, mlp_size=3072
    )
    assert round(count(base) / 1e6, 1) == 87.3
    huge = dataclasses.replace(video, **one_head, hidden_size=1280, num_layers=32, mlp_size=5120)
    assert round(count(huge) / 1e6) == 634
    for size, config in (("b", base), ("l", dataclasses.replace(video, **one_head)), ("h", huge)):
        with torch.device("meta"):
            model = MaskedTransformer.from_preset(f"magvit-{size}", num_classes=101)
            several = MaskedTransformer.from_preset(f"magvit-{size}-multitask")
        assert model.config == config
        assert model.config.prefix_length + model.config.num_tokens == 1025
        assert several.config.prefix_length + several.config.num_tokens == 1026


def test_a_stored_model_comes_back(tmp_path: Path) -> None:
    model = MaskedTransformer(dataclasses.replace(TINY, prompts=("frame_prediction",))).eval()
    model.save_pretrained(tmp_path / "model")
    other = MaskedTransformer.from_pretrained(tmp_path / "model")
    assert other.config == model.config
    tokens, mask = tiny_batch()
    assert torch.equal(model(tokens, mask, prompt_id=0), other(tokens, mask, prompt_id=0))


def test_heads_are_tied_to_their_sub_tables() -> None:
    model = MaskedTransformer(TINY)
    tokens, mask = tiny_batch()
    with torch.no_grad():
        before = model(
            tokens, torch.ones_like(mask)
        )  # all masked: the tables act on the output alone
        model.token_embedding.weight[1].mul_(2.0)
        after = model(tokens, torch.ones_like(mask))
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    torch.testing.assert_close(after[:, :, 1], 2 * before[:, :, 1])


def test_masked_tokens_are_invisible_and_visible_ones_are_not() -> None:
    model = MaskedTransformer(TINY).eval()
    tokens, mask = tiny_batch()
    logits = model(tokens, mask)
    assert logits.shape == (2, 12, 2, 8)
    assert torch.equal(logits, model(torch.where(mask, 63 - tokens, tokens), mask))
    assert not torch.equal(logits, model(torch.where(mask, tokens, 63 - tokens), mask))


def test_prefix_rows_condition_the_output() -> None:
    model = MaskedTransformer(dataclasses.replace(TINY, prompts=("frame_prediction", "inpainting")))
    tokens, mask = tiny_batch()
    row = model.prompt_id("inpainting_central", "inpainting")
    assert row == 1
    base = model(tokens, mask, prompt_id=row)
    unconditional = torch.full((2,), TINY.unconditional_class)
    assert torch.equal(
        base, model(tokens, mask, prompt_id=torch.tensor([1, 1]), class_id=unconditional)
    )
    assert not torch.equal(base, model(tokens, mask, prompt_id=0))
    other = model(tokens, mask, prompt_id=row, class_id=torch.tensor([0, TINY.num_classes]))
    assert not torch.equal(other[0], base[0])
    torch.testing.assert_close(other[1], base[1])
    with pytest.raises(ValueError, match="task: expected one of the model's prompts"):
        model.prompt_id("class_generation")


def test_initialization_is_a_truncated_normal() -> None:
    model = MaskedTransformer(TINY)
    weight = model.layers[0].mlp_in.weight
    assert weight.abs().max() <= 0.04
    assert 0.015 < weight.std() < 0.02
    assert model.layers[0].mlp_in.bias.abs().max() == 0
    assert torch.equal(model.embedding_norm.weight, torch.ones(32))


def test_a_tiny_model_overfits_a_tiny_batch() -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(TINY)
    tokens, _ = tiny_batch()
    batch = commit_mask(tokens, u=torch.tensor([0.5]), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.96))
    first = commit_loss(model(batch.tokens, batch.mask), batch).loss.item()
    for _ in range(80):
        loss = commit_loss(model(batch.tokens, batch.mask), batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 4.0  # about 2 ln 8
    assert loss.item() < 0.1
    accuracy = commit_loss(model(batch.tokens, batch.mask), batch).accuracies
    assert accuracy["mask"] == 1
    assert accuracy["reconstruct"] == 1


def test_fullgraph_compile() -> None:
    model = MaskedTransformer(TINY).eval()
    tokens, mask = tiny_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, mask), model(tokens, mask))


def test_every_parameter_gets_a_gradient() -> None:
    model = MaskedTransformer(TINY)
    tokens, mask = tiny_batch()
    model(tokens, mask, class_id=torch.tensor([0, 1])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_layer_equals_the_encoder_layer_of_torch() -> None:
    ours = PostNormLayer(32, 4, 64)
    theirs = torch.nn.TransformerEncoderLayer(
        32, 4, 64, 0.0, lambda x: F.gelu(x, approximate="tanh"), 1e-12, batch_first=True
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": ours.attention.qkv.weight,
        "self_attn.in_proj_bias": ours.attention.qkv.bias,
        "self_attn.out_proj.weight": ours.attention.out.weight,
        "self_attn.out_proj.bias": ours.attention.out.bias,
        "linear1.weight": ours.mlp_in.weight, "linear1.bias": ours.mlp_in.bias,
        "linear2.weight": ours.mlp_out.weight, "linear2.bias": ours.mlp_out.bias,
        "norm1.weight": ours.attention_norm.weight, "norm1.bias": ours.attention_norm.bias,
        "norm2.weight": ours.mlp_norm.weight, "norm2.bias": ours.mlp_norm.bias,
    })  # fmt: skip
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    config = dataclasses.replace(TINY, dropout=0.1)
    tokens, mask = tiny_batch()
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(5)
        model = MaskedTransformer(config)
        model.set_gradient_checkpointing(enabled)
        model(tokens, mask).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_subtoken_packing_is_little_endian() -> None:
    assert unpack_subtokens(torch.tensor([511, 262143, 512]), 2, 512).tolist() == [
        [511, 0], [511, 511], [0, 1],
    ]  # fmt: skip
    ids = torch.arange(4096)
    assert torch.equal(pack_subtokens(unpack_subtokens(ids, 3, 16), 16), ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"subtoken_size": 500}, "subtoken_size: expected a power of two, got 500"),
        ({"grid": (4, 4)}, "grid"),
        ({"num_classes": -1}, "num_classes"),
        ({"prompts": ("a", "a")}, "prompts"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_bad_config(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_inputs_name_the_argument() -> None:
    model = MaskedTransformer(TINY)
    tokens, mask = tiny_batch()
    with pytest.raises(ValueError, match=r"tokens: expected \[B, 12\]"):
        model(tokens[:, :5])
    with pytest.raises(TypeError, match="tokens: expected int64"):
        model(tokens.int())
    with pytest.raises(TypeError, match="tokens: expected a Tensor, got list"):
        model(tokens.tolist())
    with pytest.raises(TypeError, match=r"class_id: expected int64, got torch\.float32"):
        model(tokens, mask, class_id=torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="mask: expected bool"):
        model(tokens, mask.float())
    with pytest.raises(ValueError, match=r"class_id: expected int64 \[2\]"):
        model(tokens, mask, class_id=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"class_id: expected ids in 0\.\.3"):
        model(tokens, mask, class_id=torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="prompt_id: expected None"):
        model(tokens, mask, prompt_id=0)


# ---- other grids ---------------------------------------------------------------------------------
def positions_by_cell(model: MaskedTransformer) -> torch.Tensor:
    """[T', H', W', D]."""
    rows = model.position_embedding.detach()[model.config.prefix_length :]
    return rows.view(*model.config.grid, -1)


def test_a_smaller_grid_is_the_corner_of_the_positions() -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(dataclasses.replace(TINY, grid=(3, 4, 5))).eval()
    small = model.with_grid((2, 3, 4))
    assert small.config == dataclasses.replace(TINY, grid=(2, 3, 4))
    assert torch.equal(positions_by_cell(small), positions_by_cell(model)[:2, :3, :4])
    prefix = model.config.prefix_length
    assert torch.equal(small.position_embedding[:prefix], model.position_embedding[:prefix])
    assert not small.training
    for name, parameter in small.named_parameters():
        shared = parameter.data_ptr() == model.get_parameter(name).data_ptr()
        assert shared == (name != "position_embedding")
    tokens, mask = tiny_batch(small.config)
    assert small(tokens, mask).shape == (2, 24, 2, 8)
    same = model.with_grid((3, 4, 5))
    tokens, mask = tiny_batch(model.config)
    assert torch.equal(same(tokens, mask), model(tokens, mask))


@pytest.mark.parametrize("positions", ["corner", "interpolate"])
def test_another_grid_leaves_frozen_parameters_frozen(positions: Literal["corner", "interpolate"]):
    model = MaskedTransformer(dataclasses.replace(TINY, grid=(3, 4, 5)))
    model.position_embedding.requires_grad_(False)
    model.layers.requires_grad_(False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(expected.values())) == 2
    other = model.with_grid((2, 3, 4), positions)
    for one in (model, other):
        assert {name: p.requires_grad for name, p in one.named_parameters()} == expected


def test_interpolated_positions() -> None:
    """A ramp along an axis stays a ramp of the same ends, in cells that are finer."""
    torch.manual_seed(0)
    model = MaskedTransformer(dataclasses.replace(TINY, grid=(1, 4, 2)))
    with torch.no_grad():
        ramp = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 32).reshape(8, 32)
        model.position_embedding[1:] = ramp
    fine = model.with_grid((3, 8, 6), "interpolate")
    cells = positions_by_cell(fine)
    # the centers of eight cells in units of the four: 0.25 i - 0.25, and no further than the ends
    expected = (torch.arange(8) * 0.5 - 0.25).clamp(0, 3)
    torch.testing.assert_close(cells, expected.view(1, 8, 1, 1).expand(3, 8, 6, 32))
    again = model.with_grid((1, 4, 2), "interpolate")
    torch.testing.assert_close(again.position_embedding, model.position_embedding)
    tokens, mask = tiny_batch(fine.config)
    fine(tokens, mask).sum().backward()
    assert fine.position_embedding.grad is not None


def test_grids_that_have_no_positions() -> None:
    model = MaskedTransformer(TINY)
    with pytest.raises(
        ValueError, match=r"positions for \(2, 2, 3\) cells .* too few for \(2, 2, 4\)"
    ):
        model.with_grid((2, 2, 4))
    with pytest.raises(ValueError, match="positions: expected one of 'corner', 'interpolate'"):
        model.with_grid((2, 2, 3), "nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid: expected three positive ints"):
        model.with_grid((2, 0, 3))
    prefixed = MaskedTransformer(dataclasses.replace(TINY, condition_tokens=6))
    with pytest.raises(ValueError, match="this one has 6 condition tokens"):
        prefixed.with_grid((2, 2, 2))
