"""Open-MAGVIT2's checkpoints in our tokenizer: same tokens, videos and gradients; files and errors."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.compat.open_magvit2 import Peer

from magvit_fast.compat.open_magvit2 import (
    load_open_magvit2,
    open_magvit2_config,
    open_magvit2_names,
)
from magvit_fast.errors import FileFormatError
from magvit_fast.models import MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.nn.norm import AdaptiveGroupNorm, latent_statistics
from magvit_fast.nn.resample import Upsample
from magvit_fast.nn.stream import StreamState

VIDEO = Peer()
# Two channels a group at least: of one alone, norms take out what the shifts add.
IMAGE = Peer(filters=64, multipliers=(1, 1, 2), flat=True)
PEERS = {
    "video": (VIDEO, 5),
    "image-as-video": (VIDEO, 1),
    "conv-shortcut": (replace(VIDEO, multipliers=(1, 2), blocks=2, conv_shortcut=True), 2),
    "image": (IMAGE, 1),
}


def clip(frames: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(batch, 3, frames, 16, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", PEERS)
def test_same_tokens_videos_and_gradients(name: str) -> None:
    peer, frames = PEERS[name]
    state = peer.state()
    model = load_open_magvit2(state, dtype=torch.float64)
    video = clip(frames)
    theirs = {key: value.clone().requires_grad_() for key, value in state.items()}
    signed = video[:, :, 0] * 2 - 1 if peer.flat else video * 2 - 1
    z = peer.encode(theirs, signed)
    quantized, ids = peer.quantize(z)
    expected = (peer.decode(theirs, quantized) + 1) / 2
    z, expected = (x.unsqueeze(2) if peer.flat else x for x in (z, expected))

    assert torch.equal(model.encode(video).flatten(), ids)
    out = model(video)
    torch.testing.assert_close(out.z, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.reconstruction, expected, rtol=1e-9, atol=1e-9)
    decoded = model.decode(ids.view(z.shape[0], *z.shape[2:]))
    torch.testing.assert_close(decoded, expected.clamp(0, 1), rtol=1e-9, atol=1e-9)

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (out.reconstruction * weights).sum().backward()
    names = open_magvit2_names(model)
    assert sorted(names.values()) == sorted(state)
    for ours, key in names.items():
        gradient, exact = model.get_parameter(ours).grad, theirs[key].grad
        assert gradient is not None, key
        assert exact is not None, key
        scale = float(exact.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            gradient.view_as(exact), exact, rtol=1e-7, atol=1e-8 * scale, msg=lambda m, k=key: k + m
        )


def test_float32_through_the_kernels() -> None:
    state = VIDEO.state(1)
    model = load_open_magvit2(state)
    video = clip(5)
    z = VIDEO.encode(state, video * 2 - 1)
    with torch.no_grad():
        ours = model.encoder(model._check_video(video.float()))
        torch.testing.assert_close(ours.double(), z, rtol=0, atol=1e-4 * float(z.abs().max()))
        exact = VIDEO.decode(state, VIDEO.quantize(z)[0])
        decoded = model.decoder(VIDEO.quantize(z)[0].float()).double()
    torch.testing.assert_close(decoded, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_the_published_model() -> None:
    shapes = Peer(128, (1, 2, 2, 4), 4, 18).shapes()
    counts = {
        half: [math.prod(shape) for key, shape in shapes.items() if key.startswith(half)]
        for half in ("encoder", "decoder")
    }
    assert (len(counts["encoder"]), sum(counts["encoder"])) == (133, 144_865_298)
    assert (len(counts["decoder"]), sum(counts["decoder"])) == (150, 225_682_051)
    config = open_magvit2_config(shapes)
    assert config.temporal_downsample == (False, True, True)
    assert config.latent_shape(17, 128, 128) == (5, 16, 16)
    with torch.device("meta"):
        model = MagvitV2Tokenizer(config)
    names = open_magvit2_names(model)
    assert {names[k]: tuple(p.shape) for k, p in model.named_parameters()} == shapes
    ours = sum(p.numel() for p in model.encoder.parameters())
    assert ours == 144_865_298
    assert sum(p.numel() for p in model.decoder.parameters()) == 225_682_051


# ---- files ---------------------------------------------------------------------------------------
def lightning(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """A checkpoint as Lightning writes them: averages, losses and more beside the networks."""
    averages = {f"model_ema.{key.replace('.', '')}": value / 2 for key, value in state.items()}
    rest = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(2),
        "model_ema.lossdiscriminatormain0weight": torch.zeros(2),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(7),
    }
    return {"state_dict": {**state, **averages, **rest}, "epoch": 3, "optimizer_states": [{"a": 1}]}


def test_files_hold_the_same_model(tmp_path: Path) -> None:
    state = VIDEO.state(2, torch.float32)
    expected = load_open_magvit2(state).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    torch.save(lightning(state), tmp_path / "model.ckpt")
    for name, options in (("safetensors", {}), ("pt", {}), ("ckpt", {"ema": False})):
        model = load_open_magvit2(tmp_path / f"model.{name}", **options)
        assert not model.training
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key
    averages = load_open_magvit2({key: value / 2 for key, value in state.items()}).state_dict()
    for ema in (None, True):  # the averages, where there are any
        model = load_open_magvit2(str(tmp_path / "model.ckpt"), ema=ema)
        assert all(torch.equal(v, averages[k]) for k, v in model.state_dict().items())


def test_it_becomes_a_checkpoint_of_ours(tmp_path: Path) -> None:
    model = load_open_magvit2(VIDEO.state(2, torch.float32), entropy_weight=0.3)
    assert (model.config.entropy_weight, model.config.entropy_eps) == (0.3, 1e-5)
    model.save_pretrained(tmp_path / "ours")
    again = MagvitV2Tokenizer.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    video = clip(3, 1).float()
    assert torch.equal(again.encode(video), model.encode(video))


def test_nothing_streams_and_the_error_says_why() -> None:
    model = load_open_magvit2(VIDEO.state())
    assert not model.streams
    with pytest.raises(NotImplementedError, match=r"encode_stream: .* norms span the clip"):
        model.encode_stream(clip(5))
    with pytest.raises(NotImplementedError, match=r"decode_stream: .* norms span the clip"):
        model.decode_stream(torch.zeros(1, 3, 4, 2, dtype=torch.int64))
    images = load_open_magvit2(IMAGE.state(), dtype=torch.float64)
    video = clip(3)
    ids = torch.cat(list(images.encode_stream(video, chunk_slots=1)), 1)
    assert torch.equal(ids, images.encode(video))
    made = torch.cat(list(images.decode_stream(ids, chunk_slots=2)), 2)
    torch.testing.assert_close(made, images.decode(ids))


# ---- errors --------------------------------------------------------------------------------------
def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    state = VIDEO.state()
    del state["encoder.norm_out.bias"], state["decoder.up.0.block.0.conv1.conv_1.weight"]
    state["decoder.conv_in.conv_1.bias"] = torch.zeros(5)
    state |= {"decoder.extra.weight": torch.zeros(1), "foreign": torch.zeros(1)}
    with pytest.raises(ValueError, match="does not fit Open-MAGVIT2's tokenizer") as caught:
        load_open_magvit2(state)
    for part in (
        "encoder.norm_out.bias is missing",
        "decoder.up.0.block.0.conv1.conv_1.weight is missing",
        "decoder.conv_in.conv_1.bias has shape (5,), expected (64,)",
        "decoder.extra.weight has no place",
        "foreign has no place",
    ):
        assert part in str(caught.value)
    torch.save(state, tmp_path / "damaged.ckpt")
    with pytest.raises(FileFormatError, match=r"damaged.ckpt: .*norm_out.bias is missing"):
        load_open_magvit2(tmp_path / "damaged.ckpt")


def test_what_is_no_such_checkpoint() -> None:
    state = VIDEO.state()
    with pytest.raises(ValueError, match="no running averages"):
        load_open_magvit2(state, ema=True)
    with pytest.raises(
        ValueError, match=r"encoder.conv_in.weight, encoder.conv_out.weight.* missing"
    ):
        load_open_magvit2({"weight": torch.zeros(1)})
    broken = {**state, "encoder.conv_in.conv_1.weight": torch.full((32, 3, 3, 3, 3), torch.nan)}
    with pytest.raises(ValueError, match=r"encoder.conv_in.weight are not finite"):
        load_open_magvit2(broken)
    with pytest.raises(ValueError, match=r"magvit2-pytorch.*load_magvit2_pytorch"):
        load_open_magvit2({"encoder_layers.0.fn.0.conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="state_dict: expected a mapping"):
        load_open_magvit2({"state_dict": [1]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="dtype"):
        load_open_magvit2(state, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"norm2.weight has shape \(\): that of no such layer"):
        load_open_magvit2({**state, "encoder.down.2.block.0.norm2.weight": torch.zeros(())})
    with pytest.raises(ValueError, match="expected multiples of 32"):
        load_open_magvit2({**state, "encoder.down.2.block.0.norm2.weight": torch.zeros(40)})


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("was-run"),)


def test_files_are_read_but_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": VIDEO.state(), "x": Evil()}, "evil.ckpt")
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(VIDEO.state(), "cut.ckpt")
    whole = Path("cut.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("cut.safetensors").write_bytes(whole[:100])
    Path("empty.pt").touch()
    for name in ("evil.ckpt", "evil.pt", "cut.ckpt", "cut.safetensors", "empty.pt", "none.pt"):
        with pytest.raises(FileFormatError, match=name):
            load_open_magvit2(name)
    assert not Path("was-run").exists()


# ---- the parts by themselves -----------------------------------------------------------------------
def test_up_sampling_may_keep_the_first_frame() -> None:
    torch.manual_seed(0)
    up = Upsample(4, temporal=True, keep_first_frame=True)
    usual = Upsample(4, temporal=True)
    usual.load_state_dict(up.state_dict())
    x = torch.randn(1, 4, 3, 2, 2)
    whole, other = up(x), usual(x)
    assert whole.shape == other.shape == (1, 4, 5, 4, 4)
    assert torch.equal(whole[:, :, 1:], other[:, :, 1:])
    assert not torch.allclose(whole[:, :, 0], other[:, :, 0])
    state = StreamState()
    parts = [up(x[:, :, :1], state)]
    state.started = True
    parts.append(up(x[:, :, 1:], state))
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("per_frame", [True, False])
def test_statistics_condition(per_frame: bool) -> None:
    torch.manual_seed(0)
    norm = AdaptiveGroupNorm(8, 3, groups=4, per_frame=per_frame, condition="statistics").double()
    x = torch.randn(2, 8, 5, 4, 4, dtype=torch.float64)
    latent = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64)
    mean, deviation = latent_statistics(latent, per_frame=per_frame)
    assert mean.shape == deviation.shape == (2, 3, 3 if per_frame else 1, 1, 1)
    whole = norm(x, latent, (2, 2, 2))
    for t in range(5):
        slot = slice((t + 1) // 2, (t + 1) // 2 + 1) if per_frame else slice(None)
        values = latent[:, :, slot].flatten(2)
        scale = norm.scale((values.var(2) + 1e-6).sqrt()).view(2, 8, 1, 1)
        shift = norm.shift(values.mean(2)).view(2, 8, 1, 1)
        normed = torch.nn.functional.group_norm(x[:, :, t] if per_frame else x, 4, eps=1e-6)
        frame = normed if per_frame else normed[:, :, t]
        torch.testing.assert_close(whole[:, :, t], frame * (1 + scale) + shift)
    single = latent[:, :, :1, :1, :1]
    assert torch.allclose(
        latent_statistics(single, per_frame=per_frame)[1], torch.tensor(1e-3).double()
    )


def test_parts_combine_freely() -> None:
    torch.manual_seed(0)
    config = MagvitV2Config(
        8, (1, 2), (True,), 1, 4,
        norm_condition="statistics", keep_first_frame=True, signed_pixels=True,
    )  # fmt: skip
    model = MagvitV2Tokenizer(config).eval()
    video = torch.rand(1, 3, 5, 8, 8)
    ids = model.encode(video)
    assert torch.equal(torch.cat(list(model.encode_stream(video, chunk_slots=1)), 1), ids)
    made = torch.cat(list(model.decode_stream(ids, chunk_slots=2)), 2)
    torch.testing.assert_close(made, model.decode(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="clip_norms: expected False with frame_by_frame"):
        MagvitV2Config(8, (1, 2), (False,), frame_by_frame=True, clip_norms=True)
    with pytest.raises(ValueError, match="norm_condition: expected one of"):
        replace(config, norm_condition="mean")
