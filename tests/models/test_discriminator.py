from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.compat.praxis import (
    load_praxis,
    praxis_discriminator_config,
    praxis_slots,
    to_port,
)
from magvit_fast.models.discriminator import (
    Discriminator3D,
    DiscriminatorBlock,
    DiscriminatorConfig,
)
from magvit_fast.training.losses import r1_penalty

GOLDEN = "magvit_v2/discriminator_block"
CASES = ("even", "odd", "t1", "k4")
TINY = DiscriminatorConfig(clip=(5, 8, 12), filters=4, channel_multipliers=(2, 4))


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3)


def golden_block(golden: dict[str, np.ndarray], case: str) -> DiscriminatorBlock:
    kernel = golden[f"{case}/param/conv_last/w"]
    config = DiscriminatorConfig(blur_size=int(golden[f"{case}/filter_size"]))
    block = DiscriminatorBlock(*kernel.shape[3:], config)
    load_praxis(block, golden, case)
    return block


@pytest.mark.parametrize("case", CASES)
def test_block_matches_the_golden_arrays(case: str) -> None:
    golden = load_goldens(GOLDEN)
    x = channels_first(golden[f"{case}/x"]).requires_grad_()
    y = golden_block(golden, case)(x)
    torch.testing.assert_close(y, channels_first(golden[f"{case}/y"]), atol=1e-5, rtol=0)
    (dx,) = torch.autograd.grad(y, x, channels_first(golden[f"{case}/dy"]))
    torch.testing.assert_close(dx, channels_first(golden[f"{case}/dx"]), atol=1e-5, rtol=0)


def test_every_golden_case_is_tested() -> None:
    assert {name.split("/")[0] for name in load_goldens(GOLDEN)} == set(CASES)


def test_parameter_count_of_the_published_model() -> None:
    with torch.device("meta"):
        model = Discriminator3D.from_preset("magvit-v2-base")
        logits = model(torch.empty(2, 3, 17, 128, 128))
    assert sum(p.numel() for p in model.parameters()) == 61_341_569
    assert model.config.final_grid == (1, 4, 4)
    assert logits.shape == (2, 1)


def test_a_whole_discriminator_of_the_port_loads() -> None:
    settings = {"num_frames": 5, "image_height": 8, "image_width": 12, "filters": 4}
    config = praxis_discriminator_config({**settings, "channel_multipliers": [2, 4]})
    assert config == TINY
    model, other = Discriminator3D(config), Discriminator3D(config)
    slots = praxis_slots(model)
    assert len({slot.path for slot in slots}) == len(list(model.parameters()))
    arrays = {f"param/{slot.path}": to_port(slot, model.get_parameter(slot.name)) for slot in slots}
    assert arrays["param/conv_first/w"].shape == (3, 3, 3, 3, 4)
    assert arrays["param/res_blocks_1/conv_residual/w"].shape == (1, 1, 1, 8, 16)
    assert arrays["param/proj/mlp_layers_0/linear/w"].shape == (2 * 2 * 3 * 16, 16)
    assert arrays["param/proj/mlp_layers_1/bias/b"].shape == (1,)
    load_praxis(other, arrays)
    video = torch.rand(1, 3, 5, 8, 12)
    assert torch.equal(model(video), other(video))
    with pytest.raises(ValueError, match="got frames"):
        praxis_discriminator_config({"frames": 3})


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


def test_average_pooling_matches_the_first_generation() -> None:
    golden = load_goldens("magvit_v1/06_discriminator_odd")
    model = Discriminator3D(
        DiscriminatorConfig((5, 9, 7), filters=4, channel_multipliers=(2, 4), pooling="average")
    )
    names = {"conv_in": "Conv_0", "conv_out": "Conv_1", "dense": "Dense_0", "logit": "Dense_1"}
    for i in range(2):
        for ours, theirs in (("first", 0), ("skip", 1), ("last", 2)):
            names[f"blocks.{i}.conv_{ours}"] = f"ResBlock_{i}/Conv_{theirs}"

    def port(name: str, kind: str) -> torch.Tensor:
        array = torch.from_numpy(golden[f"{kind}/{name}"].astype(np.float32))
        axes = {1: (0,), 2: (1, 0), 5: (4, 3, 0, 1, 2)}[array.dim()]
        return array.permute(axes)

    for name, parameter in model.named_parameters():
        module, leaf = name.rsplit(".", 1)
        leaf = "kernel" if leaf == "weight" else "bias"
        parameter.data.copy_(port(f"{names[module]}/{leaf}", "param"))
    video = channels_first(golden["input"]).requires_grad_()
    logits = model(video)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=1e-5, rtol=0)
    penalty = 10 * r1_penalty(logits, video)
    assert penalty.item() == pytest.approx(float(golden["r1_penalty_cost10"]), rel=1e-5)
    gradient = channels_first(golden["input_gradient"])
    (actual,) = torch.autograd.grad(logits.sum(), video, retain_graph=True)
    torch.testing.assert_close(actual, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)
    penalty.backward()  # second order
    for module, name in (("conv_in", "Conv_0"), ("logit", "Dense_1")):
        expected = port(f"{name}/kernel", "r1_param_grad")
        actual = model.get_parameter(f"{module}.weight").grad
        torch.testing.assert_close(
            actual, expected, atol=1e-4 * expected.abs().max().item(), rtol=0
        )
    back = {name: module for module, name in names.items()}
    for name, norm in zip(golden["r1_param_grad_names"], golden["r1_param_grad_l2"], strict=True):
        module, leaf = str(name).rsplit("/", 1)
        grad = model.get_parameter(f"{back[module]}.{'weight' if leaf == 'kernel' else leaf}").grad
        actual = 0.0 if grad is None else grad.norm().item()
        assert actual == pytest.approx(float(norm), rel=1e-4, abs=1e-6), name


def test_parameter_counts_of_the_first_generation() -> None:
    for filters, millions in ((128, 61.34), (64, 15.34)):
        with torch.device("meta"):
            model = Discriminator3D(DiscriminatorConfig((16, 128, 128), filters=filters))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


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
    with pytest.raises(TypeError, match="video: expected a floating-point dtype"):
        model(torch.zeros(1, 3, 5, 8, 12, dtype=torch.uint8))
    for change in (
        {"clip": (0, 8, 8)},
        {"channel_multipliers": ()},
        {"filters": 0},
        {"pooling": "max"},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(TINY, **change)


@pytest.mark.cuda
def test_cuda_gives_the_logits_and_the_penalty_of_the_cpu() -> None:
    model, video = Discriminator3D(TINY), torch.rand(2, 3, 5, 8, 12)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        clip = video.to(device).requires_grad_()
        logits = model(clip)
        penalty = r1_penalty(logits, clip)
        (gradient,) = torch.autograd.grad(penalty, model.conv_in.weight)
        results.append([t.detach().double().cpu() for t in (logits, penalty, gradient)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


def test_average_pooling_takes_axes_that_are_used_up() -> None:
    """MAGVIT's published discriminator halves 16 frames five times: the last time, one frame."""
    torch.manual_seed(0)
    config = DiscriminatorConfig(
        (4, 8, 8), filters=4, channel_multipliers=(1,) * 4, pooling="average"
    )
    assert config.final_grid == (1, 1, 1)
    logits = Discriminator3D(config)(torch.rand(2, 3, 4, 8, 8))
    assert logits.shape == (2, 1)
    assert logits.isfinite().all()


@pytest.mark.parametrize("pooling", ["blur", "average"])
def test_the_image_discriminator_is_the_3d_one_on_one_frame_but_for_dimmed_pooling(
    pooling: str,
) -> None:
    """One frame meets the middle slice of each 3D kernel alone; blur pooling halves it there."""
    torch.manual_seed(0)
    shape = {"clip": (1, 9, 12), "filters": 4, "channel_multipliers": (2, 3), "pooling": pooling}
    flat, full = (
        Discriminator3D(DiscriminatorConfig(**shape, frame_by_frame=flat)) for flat in (True, False)
    )
    state = {k: v[:, :, v.shape[2] // 2 :][:, :, :1] if v.dim() == 5 else v
             for k, v in full.state_dict().items()}  # fmt: skip
    flat.load_state_dict(state)
    image = torch.rand(2, 3, 1, 9, 12)
    block, whole = flat.blocks[0], full.blocks[0]
    x = torch.rand(2, 4, 1, 9, 12)
    pooled, dimmed = block._pool(x), whole._pool(x)
    torch.testing.assert_close(pooled, dimmed * (2 if pooling == "blur" else 1))
    if pooling == "average":
        torch.testing.assert_close(flat(image), full(image))
    constant = torch.ones(1, 4, 1, 9, 12)
    inside = block._pool(constant)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))


def test_an_image_discriminator_takes_no_clips() -> None:
    with pytest.raises(ValueError, match="frame_by_frame: expected clips of one frame, got 17"):
        DiscriminatorConfig(frame_by_frame=True)
