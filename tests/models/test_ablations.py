"""The parts that MAGVIT and MAGVIT-v2 differ in: each by itself, in any combination, by count."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from magvit_fast.models import (
    Discriminator3D,
    DiscriminatorConfig,
    MagvitConfig,
    MagvitTokenizer,
    MagvitV2Config,
    MagvitV2Tokenizer,
    VideoTokenizer,
)
from magvit_fast.models.ablations import ablation_steps

TINY: dict[str, Any] = {
    "filters": 8, "channel_multipliers": (1, 2, 2, 4), "norm_groups": 4, "num_res_blocks": 1,
    "num_bits": 5, "embedding_dim": 6,
}  # fmt: skip


def tiny(**changes: Any) -> MagvitV2Tokenizer:
    torch.manual_seed(0)
    model = MagvitV2Tokenizer(MagvitV2Config(**{**TINY, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def clip(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- parameter counts ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "changes", "parameters"),
    [
        ("magvit-v2-base", {}, 376_003_221),
        # 370.5M and 56.4M: 4 x 4 x 4 - 3 x 3 x 3 = 37 fewer taps in three square convolutions.
        ("magvit-v2-base", {"down_kernel": 3}, 376_003_221 - 37 * (128**2 + 2 * 256**2)),
        ("magvit-v2-small", {}, 57_813_333),
        ("magvit-v2-small", {"down_kernel": 3}, 57_813_333 - 37 * (64**2 + 2 * 128**2)),
        # Without the adaptive norms: 2 x (19 x C) parameters a level.
        (
            "magvit-v2-small",
            {"adaptive_norm": False},
            57_813_333 - 2 * 19 * (256 + 256 + 128 + 128),
        ),
    ],
)
def test_parameters_of_the_variants(preset: str, changes: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        assert count(MagvitV2Tokenizer.from_preset(preset, **changes)) == parameters


def test_parameters_of_magvit_with_lfq() -> None:
    """Table 5a, first row: the layout of MAGVIT-B around 18 bits is "39M" (38.6M)."""
    with torch.device("meta"):
        model = MagvitTokenizer.from_preset("magvit-b", quantizer="lfq", codebook_size=2**18)
    assert round(count(model) / 1e6, 1) == 38.6
    # What the codebook and the wider latent had: 1024 x 256, and 238 channels of two convolutions.
    vq = 40_579_843 - 1024 * 256
    assert count(model) == vq - 238 * (256 + 1) - 238 * 27 * 256


# ---- switches ------------------------------------------------------------------------------------
SWITCHES = [
    dict(zip(("quantizer", "causal", "resample", "adaptive_norm"), choice, strict=True))
    for choice in itertools.product(("lfq", "vq"), (True, False), ("conv", "pool"), (True, False))
]


def name(switches: dict[str, Any]) -> str:
    return "-".join(str(v) for v in switches.values())


@pytest.mark.parametrize("switches", SWITCHES, ids=name)
def test_switches_compose(switches: dict[str, Any]) -> None:
    """Shapes, both halves of forward, a gradient for everything: in all 16 combinations."""
    model = tiny(**switches, temporal_downsample=(True, False, True))
    frames = 9 if switches["causal"] else 8
    video = clip(2, 3, frames, 16, 8)
    output = model(video)
    assert output.reconstruction.shape == video.shape
    assert output.ids.shape == (2, *model.config.latent_shape(frames, 16, 8))
    assert output.ids.shape[1] == (3 if switches["causal"] else 2)
    assert int(output.ids.max()) < 32
    with torch.no_grad():
        assert torch.equal(model.encode(video), output.ids)
        decoded = model.decode(output.ids)
    torch.testing.assert_close(decoded, output.reconstruction.clamp(0, 1))
    (output.reconstruction.square().mean() + output.losses["quantizer"]).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("resample", ["conv", "pool"])
def test_slots_are_causal_exactly_where_the_model_is(resample: str) -> None:
    for causal in (True, False):
        model = tiny(causal=causal, resample=resample, temporal_downsample=(True, True, False))
        video = clip(1, 3, 13 if causal else 12, 8, 8)
        for frame in (4, 5, 11):
            changed = video.clone()
            changed[:, :, frame] = clip(1, 3, 8, 8, seed=frame)
            with torch.no_grad():
                before, after = model.encoder(video), model.encoder(changed)
            same = [torch.equal(before[:, :, s], after[:, :, s]) for s in range(before.shape[2])]
            first = -(-frame // 4)  # the first slot s with 4 s >= frame
            assert same[:first] == [causal] * first
            assert not same[-1]


def test_pooled_causal_layers_stream() -> None:
    model = tiny(resample="pool", temporal_downsample=(True, False, True))
    video = clip(1, 3, 17, 8, 16)
    ids = model.encode(video)
    assert torch.equal(torch.cat(list(model.encode_stream(video, chunk_slots=1)), 1), ids)
    pieces = list(model.decode_stream(ids, chunk_slots=2))
    torch.testing.assert_close(torch.cat(pieces, 2), model.decode(ids), rtol=0, atol=1e-12)


def test_a_non_causal_model_says_that_it_does_not_stream() -> None:
    model = tiny(causal=False)
    with pytest.raises(NotImplementedError, match=r"encode_stream: .* not causal"):
        model.encode_stream(clip(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match="a multiple of 4 frames, got 9"):
        model.encode(clip(1, 3, 9, 8, 8))


def test_the_order_of_temporal_downsampling_moves_the_halving() -> None:
    """Late: 17 frames at two levels; early: at one."""
    seen = {}
    for order in ((False, True, True), (True, True, False)):
        model, frames = tiny(temporal_downsample=order), []
        for level in model.encoder.levels:
            level.register_forward_hook(lambda _m, _i, out, to=frames: to.append(out.shape[2]))
        model.encode(clip(1, 3, 17, 8, 8))
        seen[order] = frames
    assert seen[False, True, True] == [17, 9, 5, 5]
    assert seen[True, True, False] == [9, 5, 5, 5]


# ---- the ladder of the tables --------------------------------------------------------------------
def test_the_first_step_is_magvit_and_the_last_is_magvit_v2() -> None:
    first, last = ablation_steps("5c")[0], ablation_steps("5c")[-1]
    config = MagvitV2Config(filters=64, causal=False, pad_mode="zeros", **first.tokenizer)
    with torch.device("meta"):
        ladder, magvit = MagvitV2Tokenizer(config), MagvitTokenizer.from_preset("magvit-b")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ladder, magvit)]
    assert shapes[0] == shapes[1]
    assert MagvitV2Config(**{**last.tokenizer, "adaptive_norm": True}) == MagvitV2Config()
    assert DiscriminatorConfig(**last.discriminator) == DiscriminatorConfig()
    assert ablation_steps("5b")[-1].tokenizer == {
        k: getattr(MagvitV2Config(), k) for k in ablation_steps("5b")[-1].tokenizer
    }


def test_the_first_step_computes_what_magvit_computes() -> None:
    sizes = {"filters": 8, "norm_groups": 4, "embedding_dim": 6}
    torch.manual_seed(0)
    magvit = MagvitTokenizer(MagvitConfig(**sizes)).double().eval()
    steps = ablation_steps("5c")[0].tokenizer
    ladder = MagvitV2Tokenizer(
        MagvitV2Config(**sizes, **steps, causal=False, pad_mode="zeros")
    ).double()
    ladder.load_state_dict(magvit.state_dict())
    video = clip(1, 3, 8, 16, 16)
    ours, theirs = ladder.eval()(video), magvit(video)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.reconstruction, theirs.reconstruction)


@pytest.mark.parametrize("table", ["5b", "5c"])
def test_every_step_of_the_ladder_changes_one_thing_and_trains(table: str) -> None:
    flat = {"frame_by_frame": True, "temporal_downsample": (False,) * 3} if table == "5b" else {}
    frames = 1 if table == "5b" else 5
    before: tuple[dict[str, Any], dict[str, Any]] | None = None
    for step in ablation_steps(table):
        if before is not None:
            changed = [
                k
                for old, new in zip(before, (step.tokenizer, step.discriminator), strict=True)
                for k in new
                if old[k] != new[k]
            ]
            assert changed in (
                ["quantizer"], ["num_bits"], ["quantizer", "num_bits"], ["resample"],
                ["temporal_downsample"], ["num_res_blocks"], ["adaptive_norm"], ["pooling"],
            )  # fmt: skip
        before = step.tokenizer, step.discriminator
        small = {"filters": 4, "embedding_dim": 4}
        model: VideoTokenizer = MagvitV2Tokenizer(
            MagvitV2Config(**{**step.tokenizer, **flat, **small, "num_bits": 6})
        )
        judge = Discriminator3D(
            DiscriminatorConfig((frames, 8, 8), filters=4, channel_multipliers=(2,) * 3,
                                **step.discriminator)
        )  # fmt: skip
        output = model(clip(1, 3, frames, 8, 8).float())
        (judge(output.reconstruction).sum() + output.losses["quantizer"]).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_unknown_choices() -> None:
    with pytest.raises(ValueError, match="table: expected one of 5b, 5c, got '5d'"):
        ablation_steps("5d")
    for change, message in (
        ({"quantizer": "fsq"}, "quantizer: expected one of 'lfq', 'vq'"),
        ({"resample": "bilinear"}, "resample: expected one of 'conv', 'pool'"),
        ({"down_kernel": 5}, "down_kernel: expected 3 or 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            MagvitV2Config(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codebook_size: expected a power of two"):
        MagvitConfig(codebook_size=1000, quantizer="lfq")
