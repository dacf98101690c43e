"""2D to 3D inflation: the release's arrays, and what it does to a still video."""

from __future__ import annotations

import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.models import MagvitTokenizer, MagvitV2Config, MagvitV2Tokenizer
from magvit_fast.models.inflation import inflate, inflate_kernel

LAYOUT = {
    "filters": 8, "norm_groups": 4, "embedding_dim": 6, "codebook_size": 16,
    "channel_multipliers": (1, 2, 2), "num_res_blocks": 1,
}  # fmt: skip


class Tree(torch.nn.Module):
    """The golden's tree as a module: kernels in our axis order."""

    def __init__(self, golden: dict, case: str) -> None:
        super().__init__()
        for name, array in golden.items():
            if name.startswith(f"{case}/"):
                value = torch.from_numpy(array)
                if value.dim() == 4:
                    value = value.permute(3, 2, 0, 1)
                elif value.dim() == 5:
                    value = value.permute(4, 3, 0, 1, 2)
                key = name.removeprefix(f"{case}/").replace("/", "_")
                self.register_parameter(key, torch.nn.Parameter(value.clone()))


@pytest.mark.parametrize("mode", ["central", "average"])
def test_matches_the_release(mode: str) -> None:
    golden = load_goldens("magvit_v1/08_inflation")
    model, expected = Tree(golden, "3d_before"), Tree(golden, f"3d_{mode}")
    kept = inflate(model, Tree(golden, "2d"), mode)  # type: ignore[arg-type]
    assert kept == ["dense_mismatch_kernel"]
    for name, value in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, atol=1e-7, rtol=0)


def test_kernels_by_hand() -> None:
    kernel = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    central = inflate_kernel(kernel, 3)
    assert torch.equal(central[0, 0, 1], kernel[0, 0])
    assert not central[:, :, ::2].any()
    assert torch.equal(inflate_kernel(kernel, 4)[0, 0, 2], kernel[0, 0])
    assert torch.equal(inflate_kernel(kernel, 3, "last")[0, 0, 2], kernel[0, 0])
    torch.testing.assert_close(inflate_kernel(kernel, 3, "average").sum(2), kernel)


def test_central_inflation_treats_a_still_video_as_images() -> None:
    flat = MagvitTokenizer.from_preset(
        "magvit-2d-b", **LAYOUT, temporal_downsample=(False, False)
    ).eval()
    full = MagvitTokenizer.from_preset(
        "magvit-b", **LAYOUT, temporal_downsample=(True, False)
    ).eval()
    assert inflate(full, flat) == []
    image = torch.rand(1, 3, 1, 16, 16)
    with torch.no_grad():
        z2, z3 = flat.encoder(image), full.encoder(image.expand(-1, -1, 4, -1, -1))
        torch.testing.assert_close(z3, z2.expand_as(z3), atol=1e-5, rtol=1e-4)
        moving = torch.rand(1, 3, 4, 16, 16)
        slots = flat.encoder(moving)[:, :, ::2]
        assert (full.encoder(moving) - slots).abs().max() > 1e-3  # norms span time


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms off their trivial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("resample", ["conv", "pool"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_inflation_into_the_last_slice_keeps_the_image_model(resample: str, kernel: int) -> None:
    """The 3D model equals the 2D one on clips of one frame, and on every latent slot of a still."""
    layout = {
        "filters": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "norm_groups": 4,
        "num_bits": 6, "resample": resample, "down_kernel": kernel,
    }  # fmt: skip
    torch.manual_seed(0)
    flat = moved(
        MagvitV2Tokenizer(
            MagvitV2Config(**layout, temporal_downsample=(False, False), frame_by_frame=True)
        )
    ).double()
    full = moved(MagvitV2Tokenizer(MagvitV2Config(**layout, temporal_downsample=(False, True))))
    full = full.double()
    assert inflate(full, flat, "last") == []
    images = torch.rand(2, 3, 1, 16, 8, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = full(images), flat(images)
        torch.testing.assert_close(ours.z, theirs.z, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=0, atol=1e-12)
        assert ours.reconstruction.shape == images.shape
        still = images.expand(-1, -1, 5, -1, -1)
        z = full.encoder(still)
        torch.testing.assert_close(z, theirs.z.expand_as(z), rtol=0, atol=1e-12)
        again = full.decode(full.encode(still))
        expected = flat.decode(theirs.ids)
        torch.testing.assert_close(again, expected.expand_as(again), rtol=0, atol=1e-12)


def test_depth_to_space_of_the_image_model_serves_both_frames() -> None:
    """By hand: outputs are ordered (s_t, 2, 2, C), so both halves are the 2D kernel's outputs."""
    layout = {"filters": 4, "channel_multipliers": (1, 1), "num_res_blocks": 1, "num_bits": 3}
    flat = MagvitV2Tokenizer(
        MagvitV2Config(**layout, temporal_downsample=(False,), frame_by_frame=True)
    )
    full = MagvitV2Tokenizer(MagvitV2Config(**layout, temporal_downsample=(True,)))
    inflate(full, flat, "last")
    ours, theirs = (m.decoder.levels[0].up.conv.weight for m in (full, flat))
    assert theirs.shape == (16, 4, 1, 3, 3)
    assert ours.shape == (32, 4, 3, 3, 3)
    for half in ours.split(16):
        assert torch.equal(half[:, :, 2], theirs[:, :, 0])
        assert not half[:, :, :2].any()


def test_bad_input() -> None:
    kernel = torch.zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match="mode: expected one of"):
        inflate_kernel(kernel, 3, "first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel: expected"):
        inflate_kernel(torch.zeros(1, 1, 2, 3, 3), 3)
    with pytest.raises(ValueError, match="frames: expected 1 or more"):
        inflate_kernel(kernel, 0)
    with pytest.raises(ValueError, match="source: no parameter has"):
        inflate(torch.nn.Linear(2, 2), {"other": kernel})
