"""2D to 3D inflation: the release's arrays, and what it does to a still video."""

from __future__ import annotations

import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.models import MagvitTokenizer
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
