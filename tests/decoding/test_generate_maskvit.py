"""mf.generate with MaskViT's pair: a frame tokenizer and a window transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import magvit_fast as mf
from magvit_fast.decoding import MaskViTDecoding, clip_geometry, decode_frames
from magvit_fast.models import (
    FrameTokenizer,
    FrameTokenizerConfig,
    MagvitConfig,
    MagvitTokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
    MaskViTConfig,
    MaskViTTransformer,
)
from magvit_fast.tasks import TASKS

PREDICT = TASKS["frame_prediction"]


def make_tokenizer(**changes: Any) -> FrameTokenizer:
    """8 x 8 pixels -> 2 x 2 tokens of 4 bits, frame by frame."""
    torch.manual_seed(0)
    config = FrameTokenizerConfig(
        filters=4, channel_multipliers=(1, 1, 2), num_res_blocks=1, norm_groups=2,
        codebook_size=16, embedding_dim=4,
    )  # fmt: skip
    return FrameTokenizer(dataclasses.replace(config, **changes))


def make_transformer(**changes: Any) -> MaskViTTransformer:
    torch.manual_seed(1)
    config = MaskViTConfig(
        frames=6, grid=(2, 2), window=(1, 1), codebook_size=16, hidden_size=16, num_blocks=1,
        num_heads=2, mlp_size=32, init_std=0.5,
    )  # fmt: skip
    return MaskViTTransformer(dataclasses.replace(config, **changes))


@pytest.fixture(scope="module")
def tokenizer() -> FrameTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def transformer() -> MaskViTTransformer:
    return make_transformer()


def clip(frames: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, 8, 8, generator=torch.Generator().manual_seed(2))


def test_geometry(tokenizer: FrameTokenizer, transformer: MaskViTTransformer) -> None:
    geometry = clip_geometry(tokenizer, transformer)
    assert (geometry.size, geometry.grid, geometry.causal) == ((6, 8, 8), (6, 2, 2), False)


def test_frame_prediction(tokenizer: FrameTokenizer, transformer: MaskViTTransformer) -> None:
    video = clip()

    def run(**more: Any) -> torch.Tensor:
        settings = {"task": "frame_prediction", "video": video, "steps": 4, **more}
        return mf.generate(tokenizer, transformer, **settings)

    out = run()
    assert out.shape == video.shape
    assert not out.requires_grad
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(out, run())
    assert not torch.equal(out, run(seed=1))
    assert torch.equal(out, run(video=video[:, :, :1]))  # one given frame
    two = dataclasses.replace(PREDICT, first=2)
    assert not torch.equal(out, run(task=two))
    # given frames come back as the tokenizer reconstructs them
    with torch.no_grad():
        again = tokenizer.eval().decode(tokenizer.encode(video[:, :, :2]))
    assert torch.equal(run(task=two)[:, :, :2], again)
    assert torch.equal(run(choice_temperature=None), run(choice_temperature=0.0))
    assert not torch.equal(run(schedule="cubic"), run(schedule="square_root"))


def test_equals_decoding_of_its_tokens(
    tokenizer: FrameTokenizer, transformer: MaskViTTransformer
) -> None:
    video = clip()
    out = mf.generate(tokenizer, transformer, task="frame_prediction", video=video, steps=3, seed=5)
    tokenizer.eval()
    transformer.eval()
    with torch.no_grad():
        ids = tokenizer.encode(video)
        known = torch.arange(6) < 1
        ids = decode_frames(transformer, ids, known, MaskViTDecoding(steps=3, seed=5))
        assert torch.equal(out, tokenizer.decode(ids))


def test_goals(tokenizer: FrameTokenizer, transformer: MaskViTTransformer) -> None:
    video = clip()
    run = lambda task="frame_prediction", **more: mf.generate(  # noqa: E731
        tokenizer, transformer, task=task, video=video, steps=3, **more
    )
    with_goal = run(goal=video[:, :, -1])
    assert not torch.equal(with_goal, run())
    assert torch.equal(with_goal, run("frame_interpolation"))  # the same frames are given
    with torch.no_grad():
        last = tokenizer.eval().decode(tokenizer.encode(video[:, :, -1:]))
    assert torch.equal(with_goal[:, :, -1:], last)
    short = run(goal=video[:, :, -1], frames=4)
    assert short.shape[2] == 4
    assert torch.equal(short[:, :, -1:], last)


def test_actions_steer_the_frames() -> None:
    tokenizer, transformer = make_tokenizer(), make_transformer(action_dim=3)
    seen: list[torch.Tensor] = []
    transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["actions"]), with_kwargs=True
    )
    actions = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(3))
    run = lambda **more: mf.generate(  # noqa: E731
        tokenizer, transformer, task="frame_prediction", video=clip(), steps=2, **more
    )
    out = run(actions=actions)
    assert all(torch.equal(rows, actions) for rows in seen)
    assert not torch.equal(out, run(actions=-5 * actions))
    with pytest.raises(ValueError, match=r"actions: the transformer needs \[2, 6, 3\] .* got None"):
        run()
    with pytest.raises(ValueError, match=r"actions: expected \[2, 6, 3\] .* got \(2, 5, 3\)"):
        run(actions=actions[:, 1:])
    # a longer video: every window has the rows of its own frames
    seen.clear()
    longer = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(4))
    assert run(actions=longer, frames=9).shape[2] == 9
    assert torch.equal(seen[0], longer[:, :6])
    assert torch.equal(seen[-1], longer[:, 5:9])


def test_long_videos_by_sliding(tokenizer: FrameTokenizer, transformer: MaskViTTransformer) -> None:
    two = dataclasses.replace(PREDICT, first=2)
    run = lambda frames: mf.generate(  # noqa: E731
        tokenizer, transformer, task=two, video=clip(2), steps=2, frames=frames
    )
    one, long = run(None), run(14)
    assert long.shape[2] == 14
    assert torch.equal(long[:, :, :6], one)
    assert torch.equal(run(10), long[:, :, :10])  # exactly two windows
    assert run(7).shape[2] == 7
    assert run(3).shape[2] == 3


def test_modes_are_left_alone() -> None:
    tokenizer, transformer = make_tokenizer(), make_transformer(dropout=0.5)
    transformer.layers[0].eval()
    outs = [
        mf.generate(tokenizer, transformer, task=PREDICT, video=clip(1), steps=2) for _ in range(2)
    ]
    assert torch.equal(*outs)  # no dropout inside
    assert transformer.training
    assert tokenizer.training
    assert not transformer.layers[0].training


def test_injected_noise(tokenizer: FrameTokenizer, transformer: MaskViTTransformer) -> None:
    noise = [(torch.randn(2, 24, 1, 16), torch.randn(2, 24)) for _ in range(2)]
    run = lambda **more: mf.generate(  # noqa: E731
        tokenizer, transformer, task=PREDICT, video=clip(), steps=2, noise=noise, **more
    )
    assert torch.equal(run(seed=1), run(seed=2))
    with pytest.raises(ValueError, match="noise, goal: expected None for a result of 2 clips"):
        run(frames=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "outpainting_central"}, "task: expected frame_prediction or frame_interpolation"),
        ({"task": "class_generation", "video": None}, "task: expected frame_prediction or"),
        ({"video": None}, "task frame_prediction needs one of at least 1 frames of 8x8"),
        ({"video": clip(1), "task": "frame_interpolation"}, "needs at least 2 frames, got 1"),
        ({"video": clip()[..., :4]}, r"expected 8x8 pixels \(the transformer's 2x2 .* got 8x4"),
        ({"class_id": 1}, "class_id: expected None, MaskViT has no classes; got 1"),
        ({"guidance": 1.0}, "guidance: expected 0, MaskViT has no unconditional branch"),
        ({"actions": torch.zeros(2, 6, 3)}, "actions: expected None, the transformer was built"),
        ({"goal": clip()[:, :, 0] * 2}, r"goal: expected values in \[0, 1\]"),
        ({"goal": clip()[:, :, 0, :4]}, r"goal: expected 8x8 pixels .* got 4x8"),
        ({"goal": clip()[:1, :, 0]}, r"goal: expected \(2, 3, 8, 8\) .* got \(1, 3, 8, 8\)"),
        ({"goal": clip()[:, :, 0], "frames": 9}, "noise, goal: expected None for a result of 2"),
        ({"goal": clip()[:, :, 0], "task": "frame_interpolation"}, "takes the last frame from"),
        ({"goal": clip()[:, :, 0], "frames": 2}, "goal: 2 given frames leave none of 2 to"),
        ({"frames": 1}, "task frame_prediction: expected at least 1 leading frame and 1"),
        ({"schedule": "sawtooth"}, "schedule: expected one of"),
    ],
)
def test_bad_input_names_both_sides(
    change: dict[str, Any],
    message: str,
    tokenizer: FrameTokenizer,
    transformer: MaskViTTransformer,
) -> None:
    arguments = {"task": "frame_prediction", "video": clip(), "steps": 2, **change}
    with pytest.raises(ValueError, match=message):
        mf.generate(tokenizer, transformer, **arguments)


def test_models_that_do_not_fit(tokenizer: FrameTokenizer, transformer: MaskViTTransformer) -> None:
    run = lambda *pair, **more: mf.generate(  # noqa: E731
        *pair, task="frame_prediction", video=clip(), **more
    )
    with pytest.raises(ValueError, match=r"its 64 codes are 6 bits, but the .* ids have 4 bits"):
        run(tokenizer, make_transformer(codebook_size=64))
    with pytest.raises(ValueError, match="expected 16x8 pixels"):
        run(tokenizer, make_transformer(grid=(4, 2)))
    joined = MagvitTokenizer(
        MagvitConfig(
            filters=4, channel_multipliers=(1, 1, 2), temporal_downsample=(True, False),
            num_res_blocks=1, norm_groups=2, codebook_size=16, embedding_dim=4,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"every frame by itself .* with 2 frames a slot"):
        run(joined, transformer)
    masked = MaskedTransformer(
        MaskedTransformerConfig(
            hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(6, 2, 2),
            num_subtokens=1, subtoken_size=16,
        )
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="only a MaskViTTransformer takes them; this one is a Mask"
    ):
        run(tokenizer, masked, goal=clip()[:, :, 0])
