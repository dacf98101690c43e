"""The MAGVIT-v2 tokenizer: shapes, counts, causality, streaming, checkpointing, bad input."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magvit_fast import _native
from magvit_fast.models import Discriminator3D, MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.models.presets import PRESETS
from magvit_fast.nn.stream import StreamState
from magvit_fast.testing.budgets import assert_within_budget

TINY = MagvitV2Config(
    filters=4,
    channel_multipliers=(1, 1, 2, 2),
    temporal_downsample=(False, True, True),
    num_res_blocks=1,
    num_bits=6,
)


@functools.cache
def tiny(dtype: torch.dtype = torch.float64) -> MagvitV2Tokenizer:
    """A small tokenizer of the published shape (time stride 4, space stride 8) with random weights.

    float64, so that codes do not hang on the order in which a kernel sums.
    """
    torch.manual_seed(0)
    model = MagvitV2Tokenizer(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms off their trivial values
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def clip(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- sizes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "total", "encoder"),
    [
        ("magvit-v2-base", 376_003_221, 150_321_170),
        ("magvit-v2-small", 57_813_333, None),
    ],
)
def test_parameter_counts(preset: str, total: int, encoder: int | None) -> None:
    with torch.device("meta"):
        model = MagvitV2Tokenizer.from_preset(preset)
    assert sum(p.numel() for p in model.parameters()) == total
    if encoder is not None:
        assert sum(p.numel() for p in model.encoder.parameters()) == encoder
        assert sum(p.numel() for p in model.decoder.parameters()) == total - encoder


def test_the_demo_fits_into_the_package() -> None:
    with torch.device("meta"):
        model = MagvitV2Tokenizer.from_preset("magvit-v2-demo")
    assert 2 * sum(p.numel() for p in model.parameters()) < 8e6
    assert model.config.latent_shape(17, 64, 64) == (5, 8, 8)


VIDEO_PRESETS = [name for name in sorted(PRESETS["MagvitV2Tokenizer"]) if "image" not in name]


@pytest.mark.parametrize("preset", VIDEO_PRESETS)
def test_shape_chain(preset: str) -> None:
    """17 -> 9 -> 5 in the encoder, 5 -> 9 -> 17 in the decoder; on the meta device, at full width."""
    with torch.device("meta"):
        model = MagvitV2Tokenizer.from_preset(preset)
        out = model(torch.rand(1, 3, 17, 128, 128))
    bits = model.config.num_bits
    assert out.z.shape == (1, bits, 5, 16, 16)
    assert out.ids.shape == (1, 5, 16, 16)
    assert out.reconstruction.shape == (1, 3, 17, 128, 128)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_image_tokenizers_make_16_by_16_tokens(size: int) -> None:
    """And their 2D discriminators end on an 8 x 8 or 4 x 4 grid."""
    name = f"magvit-v2-image-{size}"
    with torch.device("meta"):
        model, judge = MagvitV2Tokenizer.from_preset(name), Discriminator3D.from_preset(name)
        out = model(torch.rand(1, 3, 1, size, size))
        assert judge(out.reconstruction).shape == (1, 1)
    assert out.z.shape == (1, 18, 1, 16, 16)
    assert out.reconstruction.shape == (1, 3, 1, size, size)
    assert model.config.space_stride == size // 16
    kernels = [p for p in (*model.parameters(), *judge.parameters()) if p.dim() == 5]
    assert {p.shape[2] for p in kernels} == {1}


def test_frames_at_every_level() -> None:
    model = tiny()
    seen: list[tuple[int, ...]] = []
    hooks = [
        level.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[2:])))
        for level in (*model.encoder.levels, *model.decoder.levels)
    ]
    model.decode(model.encode(clip(1, 3, 17, 16, 24)))
    for hook in hooks:
        hook.remove()
    assert seen[:4] == [(17, 8, 12), (9, 4, 6), (5, 2, 3), (5, 2, 3)]
    assert seen[4:] == [(9, 4, 6), (17, 8, 12), (17, 16, 24), (17, 16, 24)]


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (40, 8)])
def test_round_trip_shapes(frames: int, height: int, width: int) -> None:
    model = tiny()
    video = clip(2, 3, frames, height, width)
    ids = model.encode(video)
    assert ids.dtype == torch.int64
    assert ids.shape == (2, *model.config.latent_shape(frames, height, width))
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 2**6
    with torch.no_grad():
        decoded = model.decode(ids)
    assert decoded.shape == video.shape
    assert float(decoded.min()) >= 0
    assert float(decoded.max()) <= 1


@pytest.mark.parametrize(
    "config",
    [
        MagvitV2Config(4, (1,), (), 1, 3),
        MagvitV2Config(4, (1, 3), (True,), 2, 5, in_channels=1),
        MagvitV2Config(4, (2, 1, 2), (True, False), 1, 9, conv_shortcut=True, num_token_groups=2),
        MagvitV2Config(16, (1, 2, 2, 1, 4), (True, False, True, True), 1, 10, entropy_groups=5),
        MagvitV2Config(8, (1, 2), (True,), 1, 4, entropy_eps=1e-5, entropy_kind="argmax"),
    ],
    ids=lambda c: f"w{c.filters}-{len(c.channel_multipliers)}levels",
)
def test_other_configurations_train(config: MagvitV2Config) -> None:
    torch.manual_seed(0)
    model = MagvitV2Tokenizer(config)
    s, t = config.space_stride, config.time_stride
    out = model(torch.rand(1, config.in_channels, 1 + t, s, 2 * s))
    assert out.ids.shape == (1, *config.latent_shape(1 + t, s, 2 * s))
    (out.reconstruction.square().mean() + out.losses["quantizer"]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_bits_per_pixel() -> None:
    """Section 8 of the facts: 18 bits per 4 x 8 x 8 pixels, and the first slot of a 17-frame clip."""
    config = MagvitV2Config()
    steady = config.num_bits / (config.time_stride * config.space_stride**2)
    assert steady == pytest.approx(0.0703125)
    tokens = math.prod(config.latent_shape(17, 128, 128))
    assert tokens == 1280
    assert tokens * config.num_bits / (17 * 128**2) == pytest.approx(0.0827, abs=5e-5)


# ---- causality -----------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None)
@given(frame=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_latent_slot_sees_frames_up_to_4s(frame: int, seed: int) -> None:
    model = tiny()
    video = clip(1, 3, 13, 8, 16, seed=seed)
    changed = video.clone()
    changed[:, :, frame] = clip(1, 3, 8, 16, seed=seed + 1000)
    with torch.no_grad():
        before, after = model.encoder(video), model.encoder(changed)
    first = -(-frame // 4)  # the first slot s with 4s >= frame
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


@settings(max_examples=12, deadline=None)
@given(slot=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_frame_is_made_of_slots_up_to_its_own(slot: int, seed: int) -> None:
    """Frames 4s-3 .. 4s depend on slots 0 .. s only."""
    model = tiny()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**6, (1, 4, 1, 2), generator=generator)
    changed = ids.clone()
    changed[:, slot] = (ids[:, slot] + 1 + 2 * (seed % 20)) % 2**6
    with torch.no_grad():
        before, after = (model.decoder(model.quantizer.codes(i).double()) for i in (ids, changed))
    first = max(4 * slot - 3, 0)
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    for frame in range(first, 4 * slot + 1):
        assert not torch.equal(before[:, :, frame], after[:, :, frame])


def test_an_image_is_the_first_frame_of_a_video() -> None:
    model = tiny()
    video = clip(2, 3, 9, 16, 16)
    ids = model.encode(video)
    image = model.encode(video[:, :, :1])
    assert torch.equal(ids[:, :1], image)
    torch.testing.assert_close(model.decode(ids)[:, :, :1], model.decode(image))


# ---- streaming -----------------------------------------------------------------------------------
def pieces(length: int, cuts: list[int]) -> list[int]:
    edges = [0, *sorted(min(c, length) for c in cuts), length]
    return [b - a for a, b in itertools.pairwise(edges)]


@settings(max_examples=15, deadline=None)
@given(
    slots=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 17), max_size=5),
    chunk_slots=st.integers(1, 5),
)
def test_encode_stream_equals_encode(slots: int, cuts: list[int], chunk_slots: int) -> None:
    model = tiny()
    frames = 1 + 4 * slots
    video = clip(1, 3, frames, 8, 16)
    chunks = list(
        model.encode_stream(video.split(pieces(frames, cuts), 2), chunk_slots=chunk_slots)
    )
    assert torch.equal(torch.cat(chunks, 1), model.encode(video))


@settings(max_examples=15, deadline=None)
@given(
    slots=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 5), max_size=4),
    chunk_slots=st.integers(1, 5),
)
def test_decode_stream_equals_decode(slots: int, cuts: list[int], chunk_slots: int) -> None:
    model = tiny()
    ids = torch.randint(0, 2**6, (2, slots, 1, 2), generator=torch.Generator().manual_seed(slots))
    chunks = list(model.decode_stream(ids.split(pieces(slots, cuts), 1), chunk_slots=chunk_slots))
    whole = model.decode(ids)
    torch.testing.assert_close(torch.cat(chunks, 2), whole, rtol=0, atol=1e-12)


def test_streams_in_float32() -> None:
    model = tiny(torch.float32)
    video = clip(1, 3, 13, 16, 16, dtype=torch.float32)
    state, z = StreamState(), []
    with torch.no_grad():
        for piece in video.split([1, 4, 8], 2):
            z.append(model.encoder(piece, state))
            state.started = True
        whole = model.encoder(video)
    torch.testing.assert_close(torch.cat(z, 2), whole, rtol=1e-4, atol=1e-5)
    ids = model.encode(video)
    streamed = torch.cat(list(model.decode_stream(ids)), 2)
    torch.testing.assert_close(streamed, model.decode(ids), rtol=1e-4, atol=1e-5)


def test_a_stream_can_be_continued_and_many_run_at_once() -> None:
    model = tiny()
    videos = [clip(1, 3, 9, 8, 8, seed=i) for i in (1, 2)]
    states = [StreamState(), StreamState()]
    out: list[list[Tensor]] = [[], []]
    for cut in (slice(0, 5), slice(5, 9)):
        for video, state, chunks in zip(videos, states, out, strict=True):
            chunks += model.encode_stream(video[:, :, cut], state=state)
    for video, chunks in zip(videos, out, strict=True):
        assert torch.equal(torch.cat(chunks, 1), model.encode(video))


def test_a_stream_yields_as_early_as_it_can_and_keeps_no_more() -> None:
    model = tiny()
    fed: list[int] = []

    def camera() -> object:
        for i in range(41):
            fed.append(i)
            yield clip(1, 3, 1, 8, 8, seed=i)

    state = StreamState()
    held = []
    for slot, ids in enumerate(model.encode_stream(camera(), state=state)):  # type: ignore[arg-type]
        assert ids.shape == (1, 1, 1, 1)
        assert fed[-1] == 4 * slot
        assert not ids.requires_grad
        held.append(state.num_bytes())
    assert slot == 10
    assert len(set(held[2:])) == 1
    for module in model.modules():
        assert not any(isinstance(v, Tensor | StreamState) for v in vars(module).values())


def test_stream_errors() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"frames: the stream ended after 7 entries .* 2 of them"):
        list(model.encode_stream(clip(1, 3, 7, 8, 8)))
    with pytest.raises(ValueError, match="multiples of 8, got 8 x 9"):
        list(model.encode_stream(clip(1, 3, 5, 8, 9)))
    with pytest.raises(ValueError, match=r"ids: expected 0..63"):
        list(model.decode_stream(torch.full((1, 2, 1, 1), 64)))
    with pytest.raises(ValueError, match="ids: the stream ended after 0 entries"):
        list(model.decode_stream([]))
    with pytest.raises(ValueError, match="chunk_slots: expected 1 or more, got 0"):
        list(model.encode_stream(clip(1, 3, 5, 8, 8), chunk_slots=0))


# ---- training ------------------------------------------------------------------------------------
def gradients(model: MagvitV2Tokenizer, video: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(video)
    (out.reconstruction.square().mean() + out.losses["quantizer"]).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_memory_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = MagvitV2Tokenizer(TINY).double()
    video = clip(1, 3, 5, 16, 16)
    saved = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel()
        return x

    counts, results = [], []
    for levels in (False, [0], True):
        model.set_gradient_checkpointing(levels)
        saved = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(video)
        counts.append(saved)
        results.append(gradients(model, video))
    assert counts[2] < counts[1] < counts[0]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, grad in results[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_refuses_unknown_levels() -> None:
    with pytest.raises(ValueError, match=r"levels: expected indices in 0..3, got \[4\]"):
        tiny().set_gradient_checkpointing([4])


def test_train_and_eval_reconstruct_alike() -> None:
    torch.manual_seed(0)
    model = MagvitV2Tokenizer(TINY)
    video = clip(1, 3, 5, 16, 16, dtype=torch.float32)
    out = model.train()(video)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.encode(video), out.ids)
        torch.testing.assert_close(model.decode(out.ids), out.reconstruction.clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny(torch.float32)
    video = clip(1, 3, 5, 16, 16, dtype=torch.float32)
    half = MagvitV2Tokenizer(TINY).to(dtype).eval()
    half.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()})
    wide = MagvitV2Tokenizer(TINY).double().eval()
    wide.load_state_dict({k: v.double() for k, v in half.state_dict().items()})
    with torch.no_grad():
        low = half.encoder(video.to(dtype))
        assert low.dtype == dtype
        with _native.default_impl("reference"):
            plain = half.encoder(video.to(dtype))
        assert_within_budget(low, plain, wide.encoder(video.to(dtype).double()))
        ids = half.encode(video.to(dtype))
        assert half.decode(ids).dtype == dtype
        assert torch.equal(half.encode(video.to(dtype).double()), ids)  # any dtype is taken


def test_autocast_bfloat16() -> None:
    torch.manual_seed(0)
    model = MagvitV2Tokenizer(TINY)
    video = clip(1, 3, 5, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(video)
        loss = out.reconstruction.float().square().mean() + out.losses["quantizer"]
    assert out.losses["quantizer"].dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 16), r"1 \+ 4k frames \(1, 5, 9, ...\), got 16"),
        ((1, 3, 0, 16, 16), r"frames .*, got 0"),
        ((1, 3, 5, 12, 16), "height and width in multiples of 8, got 12 x 16"),
        ((1, 3, 5, 16, 0), "multiples of 8, got 16 x 0"),
        ((1, 4, 5, 16, 16), r"expected \[B, 3, T, H, W\], got \(1, 4, 5, 16, 16\)"),
        ((3, 5, 16, 16), r"expected \[B, 3, T, H, W\], got \(3, 5, 16, 16\)"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_a_video_it_cannot_take(shape: tuple[int, ...], message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(tiny(), method)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_no_numbers(value: float) -> None:
    video = clip(1, 3, 5, 8, 8)
    video[0, 1, 3, 2, 2] = value
    with pytest.raises(ValueError, match="video: expected finite values, got NaN or infinity"):
        tiny().encode(video)
    stream = tiny().encode_stream(video)
    with pytest.raises(ValueError, match="video: expected finite values"):
        list(stream)


def test_encode_keeps_nothing_for_a_gradient() -> None:
    """Ids have none; decode and forward have one."""
    model, video = MagvitV2Tokenizer(TINY).double(), clip(1, 3, 5, 8, 8)
    seen: list[bool] = []
    model.encoder.register_forward_hook(lambda _m, _a, z: seen.append(z.requires_grad))
    ids = model.encode(video.requires_grad_())
    assert model.decode(ids).requires_grad
    assert model(video).reconstruction.requires_grad
    assert seen == [False, True]


def test_encode_and_decode_compile_without_a_graph_break() -> None:
    model = MagvitV2Tokenizer(MagvitV2Config(4, (1, 2), (True,), 1, 4)).double()
    video = clip(1, 3, 3, 4, 4)
    ids = torch.compile(model.encode, fullgraph=True, backend="eager")(video)
    assert torch.equal(ids, model.encode(video))
    with torch.no_grad():
        decoded = torch.compile(model.decode, fullgraph=True, backend="eager")(ids)
        torch.testing.assert_close(decoded, model.decode(ids))


def test_wrong_types() -> None:
    model = tiny()
    with pytest.raises(TypeError, match=r"chunk_slots: expected an int, got float 1\.5"):
        next(model.encode_stream(torch.zeros(1, 3, 5, 16, 16), chunk_slots=1.5))
    with pytest.raises(
        TypeError, match=r"video: expected a floating-point Tensor, got torch.uint8"
    ):
        model.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match="video: expected a floating-point Tensor"):
        model.encode([[0.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ids: expected an int64 Tensor, got torch.int32"):
        model.decode(torch.zeros(1, 2, 1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ids: expected 0..63 .* got values in -1..5"):
        model.decode(torch.tensor([[[[-1, 5]]]]))
    with pytest.raises(ValueError, match=r"ids: expected \[B, T', H', W'\], got \(2, 2\)"):
        model.decode(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": 0}, "filters: expected a positive int"),
        ({"num_res_blocks": 0}, "num_res_blocks: expected a positive int"),
        ({"channel_multipliers": ()}, "channel_multipliers: expected positive ints"),
        ({"channel_multipliers": (1, 2)}, r"temporal_downsample: expected one entry .* \(1\)"),
        ({"filters": 40}, "channels: expected fewer than 32 or a multiple of it, got 40"),
    ],
)
def test_configs_that_make_no_model(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MagvitV2Config(), **changes)  # type: ignore[arg-type]


def test_unknown_presets_and_fields() -> None:
    with pytest.raises(ValueError, match="no preset 'magvit-v3'; there are magvit-v2-base"):
        MagvitV2Tokenizer.from_preset("magvit-v3")
    with pytest.raises(TypeError, match="colour"):
        MagvitV2Tokenizer.from_preset("magvit-v2-demo", colour=3)
