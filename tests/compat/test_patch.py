"""patch(): third-party models give what they gave, from native kernels, and come back whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tests.compat.peers import CONFIGS, autoencoder, encode_decode
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import magvit_fast as mf
from magvit_fast import _native
from magvit_fast.compat import native

pytestmark = pytest.mark.filterwarnings("ignore")  # the third parties' own


class Calls(TorchDispatchMode):
    """Counts convolutions: PyTorch's and ours."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = self.native = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.torch += name.startswith(("aten.convolution.", "aten.conv3d", "aten.slow_conv3d"))
        self.native += name.startswith("magvit_fast.causal_conv3d.")
        return function(*args, **(kwargs or {}))


def assert_close(actual: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """As good as the unpatched model in float32 is: both against the model in float64."""
    scale = float(exact.abs().max())
    error = float((actual.double() - exact).abs().max())
    allowed = 4 * float((plain.double() - exact).abs().max()) + 2e-5 * scale
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"


# --- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX"])
def test_weights_reordered_by_patch(name: str) -> None:
    model, video = autoencoder(name)
    with torch.no_grad():
        plain = encode_decode(model, video)
        mf.patch(model, channels_last=True)
        patched = encode_decode(model, video)
        assert any(
            isinstance(m, nn.Conv3d) and not m.weight.is_contiguous() for m in model.modules()
        )
        mf.unpatch(model)
        assert all(p.is_contiguous() for p in model.parameters())
    for actual, expected in zip(patched, plain, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_autoencoders_of_diffusers(name: str) -> None:
    model, video = autoencoder(name)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    with torch.no_grad():
        exact = encode_decode(copy.deepcopy(model).double(), video.double())
        plain = encode_decode(model, video)
        report = mf.patch(model, verify=True)
        with Calls() as calls:
            patched = encode_decode(model, video)
        for what, a, p, e in zip(("latent", "video"), patched, plain, exact, strict=True):
            assert_close(a, p, e, what)
        assert {key: value.shape for key, value in model.state_dict().items()} == keys
        assert not report.left, report
        assert calls.native > 0
        assert calls.torch == 0
        assert mf.unpatch(model) == len(report.swapped)
        again = encode_decode(model, video)
    assert all(torch.equal(a, p) for a, p in zip(again, plain, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "AutoencoderKLWan",
        "AutoencoderKLCogVideoX",
        "AutoencoderKLCosmos",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLMagvit",
        "AutoencoderVidTok",
    ],
)
def test_gradients(name: str) -> None:
    model, video = autoencoder(name)

    def gradients(of: nn.Module, clip: Tensor) -> dict[str, Tensor]:
        of.zero_grad()
        encode_decode(of, clip)[1].square().mean().backward()
        return {k: p.grad.clone() for k, p in of.named_parameters() if p.grad is not None}

    exact = gradients(copy.deepcopy(model).double(), video.double())
    plain = gradients(model, video)
    mf.patch(model)
    patched = gradients(model, video)
    assert patched.keys() == plain.keys()
    scale = max(float(g.abs().max()) for g in exact.values())
    worst_plain = max(float((plain[k].double() - exact[k]).abs().max()) for k in exact)
    worst = max(float((patched[k].double() - exact[k]).abs().max()) for k in exact)
    assert worst <= 4 * worst_plain + 2e-5 * scale


_TILES = {
    "tile_sample_min_height": 16,
    "tile_sample_min_width": 16,
    "tile_sample_stride_height": 8,
    "tile_sample_stride_width": 8,
}


def _tiled(model: nn.Module) -> None:
    frames = {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4}
    model.enable_tiling(**_TILES, **frames)


def _magvit_tiled(model: nn.Module) -> None:
    model.enable_tiling(**_TILES, tile_sample_min_num_frames=5)


def _overlapping(model: nn.Module) -> None:
    model.enable_tiling(16, 16, 0.5, 0.5)


def _nothing(model: nn.Module) -> None:
    del model


@pytest.mark.parametrize(
    ("name", "frames", "size", "prepare"),
    [
        ("AutoencoderKLWan", 17, 16, _nothing),  # always chunk by chunk, cache_x as argument
        ("AutoencoderKLCogVideoX", 33, 16, _nothing),  # conv_cache through the whole tree
        ("AutoencoderKLHunyuanVideo", 17, 24, _tiled),
        ("AutoencoderKLCosmos", 17, 32, _nothing),
        ("AutoencoderKLMagvit", 17, 16, _nothing),  # prev_features kept on the modules
        ("AutoencoderKLMagvit", 9, 24, _magvit_tiled),  # the same, cleared for each tile
        ("AutoencoderKLCogVideoX", 17, 24, _overlapping),
        ("AutoencoderVidTok", 33, 16, _overlapping),  # causal_cache kept on the modules
    ],
)
def test_chunked_decode(name: str, frames: int, size: int, prepare) -> None:
    model, _ = autoencoder(name)
    prepare(model)
    video = torch.rand(1, 3, frames, size, size) * 2 - 1
    with torch.no_grad():
        exact = encode_decode(copy.deepcopy(model).double(), video.double())
        plain = encode_decode(model, video)
        mf.patch(model)
        patched = encode_decode(model, video)
        again = encode_decode(model, video)  # no state is left behind
    for what, a, p, e in zip(("latent", "video"), patched, plain, exact, strict=True):
        assert_close(a, p, e, what)
    assert all(torch.equal(a, b) for a, b in zip(patched, again, strict=True))


# --- single modules ---------------------------------------------------------------------------
CONVS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2)), (2, 4, 7, 9)),
    "2d valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 9)),
    "2d same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 9)),
    "2d unbatched": (nn.Conv2d(4, 6, 3), (4, 7, 9)),
    "3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 7)),
    "3d strided": (nn.Conv3d(4, 6, (3, 4, 4), stride=2, padding=1), (2, 4, 5, 6, 7)),
    "3d same dilated": (nn.Conv3d(4, 6, (2, 3, 3), padding="same", dilation=2), (2, 4, 5, 6, 7)),
    "3d grouped": (nn.Conv3d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 6, 7)),
    "3d depthwise": (nn.Conv3d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 6, 7)),
    "3d replicate": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 5, 6, 7)),
    "3d reflect": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6, 7)),
    "3d unbatched": (nn.Conv3d(4, 6, 3, padding=1), (4, 5, 6, 7)),
    "3d circular": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6, 7)),
    "3d taps apart": (nn.Conv3d(4, 4, (1, 2, 2), stride=(1, 2, 2), groups=4), (2, 4, 3, 7, 8)),
    "3d in time alone": (nn.Conv3d(4, 6, (3, 1, 1), dilation=(2, 1, 1)), (2, 4, 7, 3, 4)),
    "1x1x1": (nn.Conv3d(4, 6, 1, bias=False), (2, 4, 5, 3, 4)),
    "1x1": (nn.Conv2d(4, 6, 1), (3, 4, 5, 3)),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_convolutions(kind: str, order: str) -> None:
    module, size = CONVS[kind]
    module, x = copy.deepcopy(module), torch.randn(size)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if order == "channels last" and len(size) in last and "unbatched" not in kind:
        x = x.contiguous(memory_format=last[len(size)])
    plain = module(x)
    exact = copy.deepcopy(module).double()(x.double())
    report = mf.patch(module, verify=True)
    assert [e.op for e in report.swapped] == ["causal_conv3d"]
    with torch.no_grad():  # matrix products and kept weights are for inference
        for _ in range(3):
            assert_close(module(x), plain, exact, kind)
        with _native.default_impl("native"), Calls() as calls:  # "auto" may find PyTorch faster
            module(x)
        assert calls.torch == 0
    patched = module(x)
    assert patched.shape == plain.shape
    assert_close(patched, plain, exact, kind)
    if len(size) == 5 and kind not in ("3d taps apart", "3d circular"):  # the order of the input
        wanted = torch.channels_last_3d if "last" in order else torch.contiguous_format
        assert patched.is_contiguous(memory_format=wanted)


def test_a_changed_weight_counts_at_once() -> None:
    """Also where its packed form or its view with five axes is kept, and if it moves."""
    module, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 9, 9)
    twin = copy.deepcopy(module)
    mf.patch(module)
    with torch.no_grad():
        for change in (
            lambda m: None,
            lambda m: m.weight.mul_(2),
            lambda m: setattr(m.weight, "data", m.weight.data * 3),
            lambda m: setattr(m, "weight", nn.Parameter(m.weight + 1)),
            lambda m: m.to(memory_format=torch.channels_last),
        ):
            change(module)
            change(twin)
            for _ in range(3):
                torch.testing.assert_close(module(x), twin(x), atol=1e-4, rtol=1e-4)


def test_weights_in_channels_last_order_give_results_in_it() -> None:
    """PyTorch's rule: one of the two in that order is enough."""
    module = nn.Conv3d(4, 6, 3).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 4, 5, 6, 7)
    assert module(x).is_contiguous(memory_format=torch.channels_last_3d)
    mf.patch(module)
    assert module(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 5, 4), (2, 8, 3, 5, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(shape: tuple[int, ...], affine: bool) -> None:
    module = nn.GroupNorm(4, 8, affine=affine, eps=1e-5)
    if affine:
        nn.init.normal_(module.weight)
    x = torch.randn(shape) + 3
    plain, exact = module(x), copy.deepcopy(module).double()(x.double())
    assert len(mf.patch(module, verify=True).swapped) == 1
    assert_close(module(x), plain, exact, "group norm")


def test_group_norm_and_silu_become_one_where_nobody_looks_between() -> None:
    norm, shared = nn.GroupNorm(2, 4), nn.SiLU()
    model = nn.Sequential(norm, nn.SiLU(), nn.Conv3d(4, 4, 1), nn.GroupNorm(2, 4), shared, shared)
    x = torch.randn(1, 4, 3, 5, 5)
    plain = model(x)
    mf.patch(model)
    assert norm.native_activation == "silu"
    assert model[3].native_activation is None  # that SiLU stands in two places
    torch.testing.assert_close(model(x), plain)
    mf.unpatch(model)
    assert [type(m) for m in model][:2] == [nn.GroupNorm, nn.SiLU]
    assert torch.equal(model(x), plain)


def test_a_hook_between_norm_and_activation_keeps_them_apart() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    model[0].register_forward_hook(lambda module, args, output: None)
    mf.patch(model)
    assert model[0].native_activation is None


# --- what is left alone -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose3d(2, 2, 3), "transposed"),
        (nn.Conv3d(2, 2, 3, dtype=torch.complex64), "complex"),
        (nn.LazyConv3d(2, 3), "not initialized; run the model once"),
    ],
)
def test_what_is_not_served_is_left_alone(module: nn.Module, reason: str) -> None:
    before = type(module)
    report = mf.patch(nn.Sequential(module))
    assert not report.swapped
    assert type(module) is before
    assert reason in report.left[0].note
    assert reason in str(report)


def test_verification_refuses_a_module_that_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv3d(2, 2, 3)
    monkeypatch.setattr(native.NativeConv, "_conv_forward", lambda s, x, w, b: F.conv3d(x, w) + 1)
    state = torch.get_rng_state()
    report = mf.patch(module, verify=True)
    assert not report.swapped
    assert "its error is" in report.left[0].note
    assert type(module) is nn.Conv3d
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model"):
        mf.patch(torch.zeros(1))
    with pytest.raises(ValueError, match=r"ops.*conv4d"):
        mf.patch(nn.Conv3d(1, 1, 1), ops=["conv4d"])


# --- patched modules in use -------------------------------------------------------------------
def test_selected_ops_only() -> None:
    model = nn.Sequential(nn.Conv3d(4, 4, 1), nn.GroupNorm(2, 4))
    report = mf.patch(model, ops="group_norm_silu")
    assert type(model[0]) is nn.Conv3d
    assert report.count("group_norm_silu") == 1


def test_patching_twice_does_nothing_more() -> None:
    model = nn.Sequential(nn.Conv3d(4, 4, 1), nn.GroupNorm(2, 4))
    assert len(mf.patch(model).swapped) == 2
    assert not mf.patch(model).swapped
    assert mf.unpatch(model) == 2
    assert mf.unpatch(model) == 0


def test_an_optimizer_made_before_goes_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    twin = copy.deepcopy(model)
    x = torch.randn(2, 2, 3, 5, 5)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    mf.patch(model)
    for _ in range(5):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_copies_and_pickles_stay_native() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU())
    x = torch.randn(1, 2, 4, 5, 5)
    mf.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other[0].weight is not model[0].weight
        assert mf.unpatch(other) == 2
        assert type(other[0]) is nn.Conv3d


def test_float64_and_function_transforms_take_the_old_way() -> None:
    module = nn.Conv2d(2, 3, 3)
    x = torch.randn(4, 2, 5, 5)
    plain = torch.vmap(module)(x)
    double = copy.deepcopy(module).double()
    expected = double(x.double())
    mf.patch(module)
    mf.patch(double)
    torch.testing.assert_close(torch.vmap(module)(x), plain)
    assert torch.equal(double(x.double()), expected)


def test_under_autocast_and_compile() -> None:
    module = nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU())
    x = torch.randn(1, 2, 4, 5, 5)
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    mf.patch(module)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), half, atol=0.05, rtol=0.05)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), plain)


def test_autocast_keeps_every_convolution_native() -> None:
    """The second one gets bfloat16 for its float32 weights."""
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 3))
    x = torch.randn(1, 2, 6, 7, 7)
    mf.patch(model)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        _native.default_impl("native"),
        Calls() as calls,
    ):
        assert model(x).dtype == torch.bfloat16
    assert (calls.torch, calls.native) == (0, 2)
