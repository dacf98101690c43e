"""MAGVIT's tokenizer: layers against the release, sizes against the paper, behavior by definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.goldens import load_goldens

from magvit_fast.models import MagvitConfig, MagvitTokenizer
from magvit_fast.nn.conv import SameConv3d
from magvit_fast.nn.norm import GroupNormSiLU, upsample_nearest
from magvit_fast.nn.resample import AveragePool, NearestUpsample

TINY = {"filters": 8, "norm_groups": 4, "embedding_dim": 6, "codebook_size": 16}


def tiny(**changes: object) -> MagvitTokenizer:
    return MagvitTokenizer.from_preset("magvit-b", **{**TINY, **changes}).eval()


def first(array: np.ndarray) -> torch.Tensor:
    """(B, T, H, W, C) -> [B, C, T, H, W]."""
    return torch.from_numpy(array).movedim(-1, 1)


# ---- layers of the release -----------------------------------------------------------------------
def test_pooling_and_upsampling_match_the_release() -> None:
    golden = load_goldens("magvit_v1/05b_layers")
    x = first(golden["pool_in"])
    for name, temporal in (("T", True), ("noT", False)):
        torch.testing.assert_close(
            AveragePool(temporal=temporal)(x), first(golden[f"pool_{name}"]), atol=1e-6, rtol=0
        )
        factor = (2 if temporal else 1, 2, 2)
        assert torch.equal(
            upsample_nearest(x, factor, x.shape[2] * factor[0]), first(golden[f"up_{name}"])
        )


def test_group_norm_and_activations_match_the_release() -> None:
    golden = load_goldens("magvit_v1/05b_layers")
    norm = GroupNormSiLU(64, activation=None, per_frame=False)
    norm.load_state_dict(
        {
            "weight": torch.from_numpy(golden["gn_scale"]),
            "bias": torch.from_numpy(golden["gn_bias"]),
        }
    )
    x, expected = first(golden["gn_in"]), first(golden["gn_out"])
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=0)
    norm.activation = "silu"
    torch.testing.assert_close(norm(x), F.silu(expected), atol=1e-5, rtol=0)
    grid = torch.from_numpy(golden["swish_in"])
    for ours, name in (
        (F.silu(grid), "swish_out"),
        (F.gelu(grid, approximate="tanh"), "gelu_out"),
        (F.leaky_relu(grid, 0.2), "leaky_relu_0.2_out"),
    ):
        torch.testing.assert_close(ours, torch.from_numpy(golden[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mode", "name"),
    # one cell of "symmetric" padding repeats the edge
    [
        ("zeros", "zero"),
        ("reflect", "reflect"),
        ("replicate", "edge"),
        ("replicate", "symmetric"),
        ("circular", "wrap"),
    ],
)
def test_padding_modes_match_the_release(mode: str, name: str) -> None:
    golden = load_goldens("magvit_v1/05b_layers")
    conv = SameConv3d(2, 3, 3, pad_mode=mode)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(golden["conv_kernel"]).permute(4, 3, 0, 1, 2))
        conv.bias.copy_(torch.from_numpy(golden["conv_bias"]))  # type: ignore[union-attr]
    expected = first(golden[f"conv_{name}"])
    torch.testing.assert_close(conv(first(golden["conv_in"])), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)])
def test_strided_convolutions_match_the_release(stride: tuple[int, int, int]) -> None:
    golden = load_goldens("magvit_v1/05b_layers")
    conv = SameConv3d(2, 3, 4, stride)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(golden["conv4_kernel"]).permute(4, 3, 0, 1, 2))
        conv.bias.copy_(torch.from_numpy(golden["conv_bias"]))  # type: ignore[union-attr]
    expected = first(golden[f"conv4_s{''.join(map(str, stride))}_same"])
    torch.testing.assert_close(conv(first(golden["conv4_in"])), expected, atol=1e-5, rtol=0)


def test_convolutions_start_as_in_flax() -> None:
    conv = SameConv3d(64, 64, 3, init="lecun")
    std = (1 / (64 * 27)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(std, rel=0.02)
    assert conv.weight.abs().max().item() <= 2 * std / 0.8796 + 1e-6
    assert conv.bias is not None
    assert not conv.bias.any()


# ---- sizes of the paper --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "total", "encoder", "decoder"),
    [
        ("magvit-b", 40_579_843, 17_149_888, 23_167_811),
        ("magvit-l", 157_811_971, 68_443_776, 89_106_051),
        ("magvit-h", 308_440_579, 141_136_768, 165_206_659),
        ("magvit-b-64", 36_596_355, 15_379_392, 20_954_819),
        ("magvit-l-64", 141_882_371, 61_363_840, 80_256_387),
        ("magvit-2d-b", 13_809_667, 5_792_320, 7_755_203),
        ("magvit-2d-l", 53_104_387, 23_020_416, 29_821_827),
    ],
)
def test_parameter_counts(preset: str, total: int, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        model = MagvitTokenizer.from_preset(preset)
    for module, count in ((model, total), (model.encoder, encoder), (model.decoder, decoder)):
        assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize(
    ("preset", "clip", "grid"),
    [
        ("magvit-b", (16, 128, 128), (4, 16, 16)),
        ("magvit-b-64", (16, 64, 64), (4, 16, 16)),
        ("magvit-2d-b", (16, 128, 128), (16, 16, 16)),
    ],
)
def test_shapes_of_the_published_layouts(
    preset: str, clip: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = MagvitTokenizer.from_preset(preset)
        z = model.encoder(torch.empty(1, 3, *clip))
        video = model.decoder(z)
    assert model.config.latent_shape(*clip) == tuple(z.shape[2:]) == grid
    assert z.shape[1] == 256
    assert tuple(video.shape) == (1, 3, *clip)
    assert model.config.num_bits == 10


# ---- behavior ------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad_mode", ["zeros", "reflect"])
def test_encode_and_decode_are_the_two_halves_of_forward(pad_mode: str) -> None:
    model, video = tiny(pad_mode=pad_mode), torch.rand(2, 3, 8, 32, 16)
    with torch.no_grad():
        output = model(video)
        ids = model.encode(video)
        assert torch.equal(ids, output.ids)
        assert tuple(ids.shape) == (2, 2, 4, 2)
        assert torch.equal(model.decode(ids), output.reconstruction.clamp(0, 1))
    nearest = torch.cdist(
        output.z.movedim(1, -1).reshape(-1, 6).double(), model.quantizer.codebook.double()
    )
    assert torch.equal(nearest.argmin(1), ids.flatten())


def test_tokens_see_the_whole_clip() -> None:
    model, video = tiny(), torch.rand(1, 3, 16, 16, 16)
    other = video.clone()
    other[:, :, -1] = 0
    with torch.no_grad():
        assert not torch.equal(model.encoder(video)[:, :, 0], model.encoder(other)[:, :, 0])


def test_the_2d_tokenizer_works_frame_by_frame_and_streams() -> None:
    model = tiny(frame_by_frame=True, temporal_downsample=(False,) * 3)
    video = torch.rand(2, 3, 5, 16, 24)
    ids = model.encode(video)
    assert tuple(ids.shape) == (2, 5, 2, 3)
    apart = [model.encode(video[:, :, t : t + 1]) for t in range(5)]
    assert torch.equal(torch.cat(apart, 1), ids)
    assert torch.equal(torch.cat(list(model.encode_stream(video.split(2, dim=2))), 1), ids)
    whole = model.decode(ids)
    pieces = list(model.decode_stream(ids.split(3, dim=1)))
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-6, rtol=0)


def test_the_3d_tokenizer_says_why_it_does_not_stream() -> None:
    model = tiny()
    with pytest.raises(NotImplementedError, match=r"encode_stream: .* not causal"):
        model.encode_stream(torch.rand(1, 3, 16, 16, 16))
    with pytest.raises(NotImplementedError, match=r"decode_stream: .* not causal"):
        model.decode_stream(torch.zeros(1, 4, 2, 2, dtype=torch.int64))


def test_every_parameter_learns_and_recomputation_changes_no_gradient() -> None:
    model, video = tiny().train(), torch.rand(1, 3, 8, 16, 16)
    gradients = []
    for levels in (False, True):
        model.set_gradient_checkpointing(levels)
        model.zero_grad()
        output = model(video)
        (F.mse_loss(output.reconstruction, video) + output.losses["quantizer"]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for name, plain, recomputed in zip(dict(model.named_parameters()), *gradients, strict=True):
        assert plain is not None, name
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(plain, recomputed)


def test_a_training_step_in_bfloat16_lowers_the_loss() -> None:
    model, video = tiny().train(), torch.rand(2, 3, 8, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.99))
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(video)
        loss = F.mse_loss(output.reconstruction.float(), video) + output.losses["quantizer"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["magvit-b", "magvit-l"])
def test_the_published_models_train_a_step_in_bfloat16(preset: str) -> None:
    model = MagvitTokenizer.from_preset(preset)
    model.set_gradient_checkpointing()
    video = torch.rand(1, 3, 8, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = model.quantizer.codebook.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(video)
    loss = F.mse_loss(output.reconstruction.float(), video) + output.losses["quantizer"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model.quantizer.codebook, before)
    assert tuple(model.eval().encode(video).shape) == (1, 2, 4, 4)


def test_fullgraph_compile() -> None:
    model = tiny(channel_multipliers=(1, 2), temporal_downsample=(True,), num_res_blocks=1)
    video = torch.rand(1, 3, 4, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model.encode, fullgraph=True, backend="eager")
        assert torch.equal(compiled(video), model.encode(video))


def test_a_stored_model_comes_back(tmp_path: Path) -> None:
    model, video = tiny(), torch.rand(1, 3, 4, 16, 16)
    model.save_pretrained(tmp_path / "tokenizer")
    again = MagvitTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.config == model.config
    assert torch.equal(again.encode(video), model.encode(video))


def test_videos_of_any_floating_dtype() -> None:
    model, video = tiny(), torch.rand(1, 3, 4, 16, 16)
    assert torch.equal(model.encode(video.double()), model.encode(video))
    assert model.double().decode(model.encode(video)).dtype == torch.float64


def test_bad_input_names_the_argument() -> None:
    model = tiny()
    for video, message in (
        (torch.rand(1, 3, 6, 16, 16), "multiple of 4 frames, got 6"),
        (torch.rand(1, 3, 4, 12, 16), "multiples of 8, got 12 x 16"),
        (torch.rand(1, 1, 4, 16, 16), r"expected \[B, 3, T, H, W\]"),
        (torch.full((1, 3, 4, 16, 16), torch.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(video)
    with pytest.raises(TypeError, match="video: expected a floating-point"):
        model.encode(torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"ids: expected 0\.\.15"):
        model.decode(torch.full((1, 1, 2, 2), 16))
    with pytest.raises(ValueError, match="ids: expected"):
        model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids: expected an int64"):
        model.decode(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="levels"):
        model.set_gradient_checkpointing([9])
    for change, message in (
        ({"temporal_downsample": (True,)}, "temporal_downsample: expected one entry"),
        ({"frame_by_frame": True}, "temporal_downsample: expected False everywhere"),
        ({"pad_mode": "wrap"}, "pad_mode"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"filters": 0}, "filters"),
    ):
        with pytest.raises(ValueError, match=message):
            MagvitConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="power of two"):
        _ = MagvitConfig(codebook_size=1000).num_bits


def test_upsampling_repeats_and_convolves() -> None:
    up = NearestUpsample(2, temporal=True)
    with torch.no_grad():
        up.conv.weight.zero_()
        up.conv.weight[:, :, 1, 1, 1] = torch.eye(2)
    x = torch.rand(1, 2, 2, 3, 3)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(up(x), repeated)
