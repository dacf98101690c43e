"""The causal transformer as a model: what it shares with the masked one, storing, recomputation."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from magvit_fast.models import (
    AutoregressiveTransformer,
    MaskedTransformer,
    MaskedTransformerConfig,
    load_transformer,
)
from magvit_fast.nn.attention import KeyValueCache, SelfAttention

TINY = MaskedTransformerConfig(
    hidden_size=16, num_layers=2, num_heads=2, mlp_size=32, grid=(2, 2, 3), num_subtokens=1,
    subtoken_size=16, num_classes=3, dropout=0.0, init_std=0.3,
)  # fmt: skip


def tokens() -> torch.Tensor:
    return torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_it_has_the_masked_models_parameters_but_for_mask_and_one_position(size: str) -> None:
    with torch.device("meta"):
        causal = AutoregressiveTransformer.from_preset(f"magvit-{size}", num_classes=101)
        masked = MaskedTransformer.from_preset(f"magvit-{size}", num_classes=101)
    ours, theirs = dict(causal.named_parameters()), dict(masked.named_parameters())
    assert theirs.keys() - ours.keys() == {"token_embedding.mask_embedding"}
    assert ours.keys() < theirs.keys()
    different = {n for n in ours if ours[n].shape != theirs[n].shape}
    assert different == {"position_embedding"}
    counts = [sum(p.numel() for p in model.values()) for model in (theirs, ours)]
    assert counts[0] - counts[1] == 2 * causal.config.hidden_size


def test_a_stored_model_comes_back_and_is_no_masked_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(TINY).eval()
    model.save_pretrained(tmp_path / "model")
    other = load_transformer(tmp_path / "model")
    assert isinstance(other, AutoregressiveTransformer)
    assert not isinstance(other, MaskedTransformer)
    assert torch.equal(model(tokens()), other(tokens()))


def test_recomputation_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(dataclasses.replace(TINY, condition_tokens=3)).double()
    found = []
    for recompute in (False, True):
        model.set_gradient_checkpointing(recompute)
        model.zero_grad()
        logits = model(tokens(), condition=tokens()[:, :3])
        F.cross_entropy(logits.flatten(0, 2), tokens().flatten()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == dict(model.named_parameters()).keys()
        found.append(gradients)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_causal_attention_is_the_masked_softmax() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = layer.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 5, 8))
    torch.testing.assert_close(layer(x, causal=True), expected)
    for cuts in ((0, 5), (0, 1, 5), (0, 2, 3, 5)):
        cache = KeyValueCache(5)
        parts = [layer(x[:, a:b], causal=True, cache=cache) for a, b in itertools.pairwise(cuts)]
        torch.testing.assert_close(torch.cat(parts, 1), expected)
        assert cache.length == 5
    with pytest.raises(ValueError, match="cache: expected at most 5 positions, got 6"):
        layer(x[:, :1], causal=True, cache=cache)


def test_fullgraph_compile() -> None:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(TINY).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


@pytest.mark.cuda
def test_cuda_decodes_as_the_cpu() -> None:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(TINY).eval()
    expected = model(tokens())
    model.cuda()
    cache, ids = model.new_cache(), tokens().cuda()
    with torch.no_grad():
        rows = [model(ids[:, :0], cache=cache)]
        rows += [model(ids[:, i : i + 1], cache=cache) for i in range(11)]
    torch.testing.assert_close(torch.cat(rows, 1).cpu(), expected, atol=1e-4, rtol=1e-4)
