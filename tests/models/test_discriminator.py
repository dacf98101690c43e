from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from magvit_fast.models.discriminator import (
    Discriminator3D,
    DiscriminatorBlock,
    DiscriminatorConfig,
)
from magvit_fast.training.losses import r1_penalty

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "magvit_v2" / "discriminator_block.npz"
CASES = ("even", "odd", "t1", "k4")
TINY = DiscriminatorConfig(clip=(5, 8, 12), filters=4, channel_multipliers=(2, 4))


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3)


def golden_block(golden: np.lib.npyio.NpzFile, case: str) -> DiscriminatorBlock:
    def kernel(name: str) -> torch.Tensor:
        return torch.from_numpy(golden[f"{case}/param/{name}/w"].astype(np.float32)).permute(
            4, 3, 0, 1, 2
        )

    def bias(name: str) -> torch.Tensor:
        return torch.from_numpy(golden[f"{case}/param/{name}/b"].astype(np.float32))

    first, last = kernel("conv_first"), kernel("conv_last")
    block = DiscriminatorBlock(
        first.shape[1], last.shape[0], blur_size=int(golden[f"{case}/filter_size"])
    )
    block.load_state_dict({
        "conv_first.weight": first, "conv_first.bias": bias("conv_first"),
        "conv_last.weight": last, "conv_last.bias": bias("conv_last"),
        "conv_skip.weight": kernel("conv_residual"),
    })  # fmt: skip
    return block


@pytest.mark.parametrize("case", CASES)
def test_block_matches_the_golden_arrays(case: str) -> None:
    golden = np.load(GOLDEN)
    x = channels_first(golden[f"{case}/x"]).requires_grad_()
    y = golden_block(golden, case)(x)
    torch.testing.assert_close(y, channels_first(golden[f"{case}/y"]), atol=1e-5, rtol=0)
    (dx,) = torch.autograd.grad(y, x, channels_first(golden[f"{case}/dy"]))
    torch.testing.assert_close(dx, channels_first(golden[f"{case}/dx"]), atol=1e-5, rtol=0)


def test_every_golden_case_is_tested() -> None:
    assert {name.split("/")[0] for name in np.load(GOLDEN).files} == set(CASES)


def test_parameter_count_of_the_published_model() -> None:
    with torch.device("meta"):
        model = Discriminator3D.from_preset("magvit-v2-base")
        logits = model(torch.empty(2, 3, 17, 128, 128))
    assert sum(p.numel() for p in model.parameters()) == 61_341_569
    assert model.config.final_grid == (1, 4, 4)
    assert logits.shape == (2, 1)


def test_twice_differentiable_for_r1() -> None:
    torch.manual_seed(0)
    model = Discriminator3D(TINY).double()
    video = torch.rand(2, 3, 5, 8, 12, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(model(video), video)
    penalty.backward()
    # the derivative of the penalty by one weight, against finite differences
    weight = model.blocks[0].conv_first.weight
    analytic = weight.grad[0, 0, 1, 1, 1].item()
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0, 1, 1, 1] += sign * step
        values.append(r1_penalty(model(video), video).item())
        with torch.no_grad():
            weight[0, 0, 1, 1, 1] -= sign * step
    assert analytic != 0
    assert analytic == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_flatten_order_is_t_h_w_c() -> None:
    model = Discriminator3D(TINY)
    seen: list[torch.Tensor] = []
    model.conv_out.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.dense.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(torch.rand(1, 3, 5, 8, 12))
    features = torch.nn.functional.leaky_relu(seen[0], 0.2)  # [1, 16, 2, 2, 3]
    assert torch.equal(seen[1][0, (1 * 2 + 0) * 3 * 16 + 2 * 16 + 5], features[0, 5, 1, 0, 2])


def test_bad_input() -> None:
    model = Discriminator3D(TINY)
    with pytest.raises(
        ValueError, match=r"video: expected \[B, 3, 5, 8, 12\], got \(1, 3, 5, 8, 8\)"
    ):
        model(torch.rand(1, 3, 5, 8, 8))
    for change in ({"clip": (0, 8, 8)}, {"channel_multipliers": ()}, {"filters": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(TINY, **change)
