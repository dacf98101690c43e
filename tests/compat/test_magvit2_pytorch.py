"""compat layers and the patched VideoTokenizer against magvit2-pytorch itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests.compat.peers import magvit2

import magvit_fast as mf
from magvit_fast.compat import magvit2_pytorch as ours
from magvit_fast.compat.open_magvit2 import load_open_magvit2
from magvit_fast.errors import FileFormatError, MissingExtraError

pytestmark = pytest.mark.filterwarnings("ignore")  # the third parties' own

LAYERS = [
    ("CausalConv3d", (8, 12, 3), {}),
    ("CausalConv3d", (8, 12, (3, 5, 3), "reflect"), {}),
    ("CausalConv3d", (8, 12, 3, "replicate"), {}),
    ("CausalConv3d", (8, 12, (3, 1, 1)), {"stride": 2}),
    ("CausalConv3d", (8, 12, 3), {"dilation": 2, "groups": 2, "bias": False}),
    ("ResidualUnit", (8, 3), {}),
    ("ResidualUnit", (8, (3, 3, 5), "reflect"), {}),
    ("SpatialDownsample2x", (8, 12), {}),
    ("SpatialDownsample2x", (8,), {"antialias": True}),
    ("TimeDownsample2x", (8, 12), {}),
    ("TimeDownsample2x", (8,), {"antialias": True, "kernel_size": 2}),
    ("SpatialUpsample2x", (8, 12), {}),
    ("TimeUpsample2x", (8,), {}),
]


@pytest.mark.parametrize(("name", "arguments", "options"), LAYERS)
def test_layers(name: str, arguments, options) -> None:
    theirs = magvit2()
    torch.manual_seed(1)
    a = getattr(theirs, name)(*arguments, **options)
    torch.manual_seed(1)
    b = getattr(ours, name)(*arguments, **options)
    state = a.state_dict()
    assert list(b.state_dict()) == list(state)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in state.items())  # same start, too
    for frames in (1, 2, 4, 5):
        if frames == 1 and options.get("stride") == 2:
            continue  # one frame and a padding of one are fewer than the kernel
        x = torch.randn(2, 8, frames, 6, 8)
        y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, actual = a(y), b(z)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        (actual * weights).sum().backward()
        torch.testing.assert_close(z.grad, y.grad, atol=1e-4, rtol=1e-3)
    for p, q in zip(b.parameters(), a.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=2e-3, rtol=1e-3)


def tokenizer():
    return {
        "image_size": 16,
        "init_dim": 8,
        "codebook_size": 256,
        "input_conv_kernel_size": (3, 3, 3),
        "layers": (
            "residual",
            "compress_space",
            ("consecutive_residual", 2),
            "linear_attend_space",
            "attend_space",
            "compress_time",
            "attend_time",
        ),
        "perceptual_loss_weight": 0.0,
        "use_gan": False,
    }


def test_video_tokenizer() -> None:
    theirs = magvit2()
    torch.manual_seed(0)
    plain = theirs.VideoTokenizer(**tokenizer())
    torch.manual_seed(0)
    native = ours.VideoTokenizer(**tokenizer())
    assert native.state_dict().keys() == plain.state_dict().keys()
    video = torch.rand(2, 3, 5, 16, 16)
    plain.eval()
    native.eval()
    codes = plain.tokenize(video)
    agree = (native.tokenize(video) == codes).double().mean()
    assert agree > 0.99  # a feature within rounding of zero may fall on the other side
    decoded = [m.decode_from_code_indices(codes) for m in (plain, native)]
    torch.testing.assert_close(decoded[1], decoded[0], atol=2e-5, rtol=1e-4)


def test_video_tokenizer_trains_like_theirs() -> None:
    theirs = magvit2()
    losses = []
    for build in (theirs.VideoTokenizer, ours.VideoTokenizer):
        torch.manual_seed(0)
        model = build(**tokenizer())
        optimizer = torch.optim.Adam(list(model.parameters()), 1e-3)
        video = torch.rand(1, 3, 5, 16, 16)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss, _ = model(video, return_loss=True)
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_their_adversarial_training_step() -> None:
    """Both losses of a step as their trainer takes them, the discriminator's with its gradient penalty."""
    theirs = magvit2()
    found = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = theirs.VideoTokenizer(**{**tokenizer(), "use_gan": True})
        if patched:
            assert not mf.patch(model).left
        generator = torch.optim.Adam(list(model.parameters()), 1e-3)
        discriminator = torch.optim.Adam(list(model.discr_parameters()), 1e-3)
        video = torch.rand(2, 3, 5, 16, 16)
        found.append([])
        for step in range(3):
            torch.manual_seed(step)  # they pick the frame that the discriminator sees
            generator.zero_grad()
            loss, _ = model(video, return_loss=True)
            loss.backward()
            generator.step()
            discriminator.zero_grad()
            against, parts = model(video, return_discr_loss=True, apply_gradient_penalty=True)
            against.backward()
            discriminator.step()
            found[-1] += [float(v.detach()) for v in (loss, against, parts.gradient_penalty)]
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_the_whole_tokenizer_is_patched() -> None:
    theirs = magvit2()
    model = theirs.VideoTokenizer(**tokenizer())
    report = mf.patch(model, verify=True)
    assert not report.left, report
    assert report.count("lfq") == 1


def test_its_checkpoints_are_loaded(tmp_path: Path) -> None:
    theirs = magvit2()
    torch.manual_seed(4)
    plain = theirs.VideoTokenizer(**tokenizer()).eval()
    plain.save(tmp_path / "tokenizer.pt")
    model = ours.load_magvit2_pytorch(tmp_path / "tokenizer.pt", **tokenizer())
    assert isinstance(model, theirs.VideoTokenizer)
    assert not model.training
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert mf.unpatch(model)  # it was patched
    codes = torch.randint(0, 256, (1, 3, 8, 8))
    decoded = [m.decode_from_code_indices(codes) for m in (plain, model)]
    assert torch.equal(*decoded)
    with pytest.raises(FileFormatError, match=r"tokenizer.pt: .*conv_in.conv.weight has shape"):
        ours.load_magvit2_pytorch(tmp_path / "tokenizer.pt", **{**tokenizer(), "init_dim": 16})
    with pytest.raises(FileFormatError, match=r"magvit2-pytorch.*squeeze-excitation"):
        load_open_magvit2(tmp_path / "tokenizer.pt")


def test_the_arguments_in_a_checkpoint_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = magvit2().VideoTokenizer(**tokenizer())
    config = b"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'was-run'\ntRtR."
    content = {"model_state_dict": model.state_dict(), "version": "0.5.1", "config": config}
    torch.save(content, "tokenizer.pt")
    ours.load_magvit2_pytorch("tokenizer.pt", **tokenizer())
    torch.save(model, "model.pt")  # a whole module
    with pytest.raises(FileFormatError, match=r"model.pt: holds more than tensors"):
        ours.load_magvit2_pytorch("model.pt", **tokenizer())
    assert not Path("was-run").exists()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "magvit2_pytorch", None)
    with pytest.raises(MissingExtraError, match="magvit2-pytorch"):
        ours.VideoTokenizer(image_size=16)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        ours.CausalConv3d(2, 2, (3, 2, 3))
    with pytest.raises(ValueError, match="pad_mode"):
        ours.CausalConv3d(2, 2, 3, "circular")
    with pytest.raises(ValueError, match="space_only"):
        ours.Blur()(torch.zeros(1, 1, 1, 3, 3), space_only=True, time_only=True)
