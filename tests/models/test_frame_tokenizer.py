"""MaskViT's frame tokenizer: a 16 x 16 grid, every frame by itself, and the layout of a VQ-GAN."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magvit_fast.decoding.generate import clip_geometry
from magvit_fast.models import (
    FrameTokenizer,
    FrameTokenizerConfig,
    MaskedTransformer,
    MaskedTransformerConfig,
    load_tokenizer,
)
from magvit_fast.models.tokenizers import new_tokenizer
from magvit_fast.nn.blocks import FrameAttention, ResBlock3d
from magvit_fast.nn.conv import SameConv3d

TINY = FrameTokenizerConfig(
    filters=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, codebook_size=16, embedding_dim=4,
    norm_groups=4,
)  # fmt: skip


def tiny(**changes: Any) -> FrameTokenizer:
    torch.manual_seed(0)
    return FrameTokenizer(dataclasses.replace(TINY, **changes))


def clip(frames: int = 3, size: int = 16, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("preset", "size"), [(64, 64), (128, 128), (256, 256)])
def test_presets_have_a_16_by_16_grid(preset: int, size: int) -> None:
    with torch.device("meta"):
        model = FrameTokenizer.from_preset(f"maskvit-frame-{preset}")
        ids = model.encode(torch.empty(1, 3, 2, size, size))
        assert tuple(ids.shape) == (1, 2, 16, 16)
        assert tuple(model.decoder(torch.empty(1, 256, 2, 16, 16)).shape) == (1, 3, 2, size, size)
    assert model.config.latent_shape(16, size, size) == (16, 16, 16)
    assert (model.config.time_stride, model.config.space_stride) == (1, size // 16)
    assert (model.config.codebook_size, model.config.num_bits) == (1024, 10)


def test_parameter_counts() -> None:
    """Of the usual VQ-GAN with 128 filters: 29.3M and 42.4M for 256 pixels; its two 1x1 convolutions
    beside the codebook are part of their neighbors here."""
    counts = {}
    for size in (64, 128, 256):
        with torch.device("meta"):
            model = FrameTokenizer.from_preset(f"maskvit-frame-{size}")
        halves = (model.encoder, model.decoder)
        counts[size] = [sum(p.numel() for p in half.parameters()) for half in halves]
    assert counts[256] == [29_298_176, 42_449_795]
    assert sum(counts[128]) + 1024 * 256 == 70_236_547
    assert sum(counts[64]) + 1024 * 256 == 63_150_467


def test_all_convolutions_are_ours_and_flat_in_time() -> None:
    model = tiny()
    for name, module in model.named_modules():
        assert not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d), name
        if isinstance(module, SameConv3d):
            assert module.kernel_size[0] == 1, name
            assert module.stride[0] == 1, name
            assert module.bias is not None, name


def test_frames_do_not_see_each_other() -> None:
    model, video = tiny().eval(), clip(4)
    with torch.no_grad():
        whole = model.encoder(video)
        for t in range(4):
            torch.testing.assert_close(
                whole[:, :, t : t + 1], model.encoder(video[:, :, t : t + 1])
            )
        changed = video.clone()
        changed[:, :, 2] = 0.5
        difference = (model.encoder(changed) != whole).any(1).flatten(2).any(2)[0]
        assert difference.tolist() == [False, False, True, False]
        ids = model.encode(video)
        other = ids.clone()
        other[:, 1] = 15 - ids[:, 1]
        difference = (model.decode(other) != model.decode(ids)).flatten(3).any(3).any(1)[0]
        assert difference.tolist() == [False, True, False, False]


def test_streams_are_the_whole() -> None:
    model, video = tiny().eval(), clip(5)
    ids = model.encode(video)
    pieces = [video[:, :, :1], video[:, :, 1:4], video[:, :, 4:]]
    assert torch.equal(torch.cat(list(model.encode_stream(pieces)), 1), ids)
    assert torch.equal(torch.cat(list(model.encode_stream(video, chunk_slots=2)), 1), ids)
    again = torch.cat(list(model.decode_stream([ids[:, :2], ids[:, 2:]])), 2)
    torch.testing.assert_close(again, model.decode(ids))


def test_attention_block_equals_attention_written_out() -> None:
    block, x = FrameAttention(8, norm_groups=4), torch.randn(2, 8, 3, 2, 5)
    weights, biases = block.attention.qkv.weight.chunk(3), block.attention.qkv.bias.chunk(3)
    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(3):
            frame = x[b, :, t]
            y = F.group_norm(frame[None], 4, block.norm.weight, block.norm.bias, 1e-6)[0].flatten(1)
            q, k, v = (w @ y + c[:, None] for w, c in zip(weights, biases, strict=True))
            p = (q.T @ k / math.sqrt(8)).softmax(-1)
            out = block.attention.out.weight @ (v @ p.T) + block.attention.out.bias[:, None]
            expected[b, :, t] = frame + out.view_as(frame)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_attention_stands_in_the_deepest_level_and_the_middle() -> None:
    def kinds(blocks: nn.ModuleList) -> str:
        return "".join("A" if isinstance(b, FrameAttention) else "R" for b in blocks)

    model = tiny(num_res_blocks=2)
    assert [kinds(level.blocks) for level in model.encoder.levels] == ["RR", "RR", "RARA"]
    assert [kinds(level.blocks) for level in model.decoder.levels] == ["RARARA", "RRR", "RRR"]
    assert kinds(model.encoder.mid_blocks) == kinds(model.decoder.mid_blocks) == "RAR"
    plain = tiny(attention=False)
    assert not any(isinstance(m, FrameAttention) for m in plain.modules())
    assert plain.encode(clip()).shape == (1, 3, 4, 4)


def test_residual_blocks_have_biases_here_and_none_elsewhere() -> None:
    assert ResBlock3d(4, 8).conv1.bias is None
    block = ResBlock3d(4, 8, bias=True)
    assert all(c is not None and c.bias is not None for c in (block.conv1, block.conv2))
    assert block.shortcut is not None
    assert block.shortcut.bias is not None


def test_a_training_pass_and_its_losses() -> None:
    model, video = tiny(), clip(2, batch=2)
    output = model(video)
    assert output.reconstruction.shape == video.shape
    assert output.ids.shape == (2, 2, 4, 4)
    assert output.losses["entropy"] == 0  # a VQ-GAN has none
    losses = output.losses
    torch.testing.assert_close(losses["quantizer"], losses["commitment"] + losses["codebook"])
    (F.mse_loss(output.reconstruction, video) + output.losses["quantizer"]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for levels in (True, [0]):
        recomputed = tiny()
        recomputed.set_gradient_checkpointing(levels)
        again = recomputed(video)
        (F.mse_loss(again.reconstruction, video) + again.losses["quantizer"]).backward()
        torch.testing.assert_close(
            [p.grad for p in recomputed.parameters()], [p.grad for p in model.parameters()]
        )


def test_a_tiny_model_learns() -> None:
    model, video = tiny(), clip(4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        output = model(video)
        loss = F.mse_loss(output.reconstruction, video) + output.losses["quantizer"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(F.mse_loss(output.reconstruction, video).item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_in_bfloat16() -> None:
    model, video = tiny(), clip(2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(video)
    (F.mse_loss(output.reconstruction.float(), video) + output.losses["quantizer"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_the_published_layouts_train_a_step_in_bfloat16() -> None:
    for size in (64, 256):
        model = FrameTokenizer.from_preset(f"maskvit-frame-{size}")
        model.set_gradient_checkpointing()
        video = torch.rand(1, 3, 1, size, size)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(video)
        (F.mse_loss(output.reconstruction.float(), video) + output.losses["quantizer"]).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_stored_model_comes_back(tmp_path: Path) -> None:
    model, video = tiny(quantizer="lfq"), clip()
    model.save_pretrained(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert isinstance(again, FrameTokenizer)
    assert again.config == model.config
    assert torch.equal(again.encode(video), model.encode(video))
    assert type(new_tokenizer(TINY)) is FrameTokenizer
    with pytest.raises(TypeError, match="config: expected the config of a tokenizer, got Masked"):
        new_tokenizer(MaskedTransformerConfig())  # type: ignore[arg-type]


def test_it_fits_a_transformer_of_as_many_slots_as_frames() -> None:
    shape = MaskedTransformerConfig(
        hidden_size=8, num_layers=1, num_heads=1, mlp_size=8, grid=(6, 4, 4), num_subtokens=1,
        subtoken_size=16,
    )  # fmt: skip
    geometry = clip_geometry(tiny(), MaskedTransformer(shape))
    assert geometry.size == (6, 16, 16)


def test_fullgraph_compile() -> None:
    model, video = tiny().eval(), clip(2)
    with torch.no_grad():
        compiled = torch.compile(model.encode, fullgraph=True, backend="eager")
        assert torch.equal(compiled(video), model.encode(video))


def test_bad_input_names_the_argument() -> None:
    for change, message in (
        ({"frame_by_frame": False}, "frame_by_frame: expected True"),
        ({"codebook_size": 1000}, "codebook_size: expected a power of two, got 1000"),
        ({"temporal_downsample": (True, False)}, "temporal_downsample: expected False"),
        ({"channel_multipliers": (), "temporal_downsample": ()}, "channel_multipliers: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
    model = tiny()
    with pytest.raises(ValueError, match="multiples of 4, got 18 x 16"):
        model.encode(torch.rand(1, 3, 1, 18, 16))
    with pytest.raises(ValueError, match="finite"):
        model.encode(torch.full((1, 3, 1, 16, 16), torch.nan))
    with pytest.raises(ValueError, match=r"ids: expected 0\.\.15"):
        model.decode(torch.full((1, 1, 2, 2), 16))
