"""mf.generate with a MAGVIT pair: every task and schedule, condition modes, guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.decoding.pairs import clip, make_transformer

import magvit_fast as mf
from magvit_fast.decoding import MaskedDecoding, clip_geometry, generate_tokens
from magvit_fast.models import (
    MagvitConfig,
    MagvitTokenizer,
    MagvitV2Tokenizer,
    MaskedTransformer,
)
from magvit_fast.tasks import TASKS


@pytest.fixture(scope="module")
def magvit() -> tuple[MagvitTokenizer, MaskedTransformer]:
    """MAGVIT's non-causal pair: 16 frames of 16 x 16 pixels -> 4 x 4 x 4 tokens of 4 bits."""
    torch.manual_seed(3)
    tokenizer = MagvitTokenizer(
        MagvitConfig(
            filters=4, channel_multipliers=(1, 1, 2), temporal_downsample=(True, True),
            num_res_blocks=1, norm_groups=2, codebook_size=16, embedding_dim=4,
        )
    )  # fmt: skip
    prompts = (
        "full_generation",
        "frame_prediction",
        "frame_interpolation",
        "outpainting",
        "inpainting",
    )
    transformer = make_transformer(
        grid=(4, 4, 4), num_subtokens=1, subtoken_size=16, prompts=prompts
    )
    return tokenizer, transformer


@pytest.mark.parametrize("name", TASKS)
def test_every_task_with_magvit(
    name: str, magvit: tuple[MagvitTokenizer, MaskedTransformer]
) -> None:
    tokenizer, transformer = magvit
    task, geometry = TASKS[name], clip_geometry(tokenizer, transformer)
    assert (geometry.size, geometry.grid, geometry.causal) == ((16, 16, 16), (4, 4, 4), False)
    video = clip(16) if task.has_condition else None
    classes = [1, 2] if task.class_conditional else None
    settings = {"task": name, "video": video, "class_id": classes, "steps": 3}
    out = mf.generate(tokenizer, transformer, **settings)
    assert out.shape == (2, 3, 16, 16, 16)
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(out, mf.generate(tokenizer, transformer, **settings))
    if video is not None:
        # exactly the given pixels matter
        given = task.pixel_mask(geometry)
        noise = torch.rand(video.shape, generator=torch.Generator().manual_seed(9))
        same = mf.generate(
            tokenizer, transformer, **{**settings, "video": torch.where(given, video, noise)}
        )
        assert torch.equal(out, same)
        seen = task.condition_video(video, geometry)
        assert not torch.equal(seen, task.condition_video(1 - video, geometry))


def test_cuts_and_fixed_conditions_reach_the_decoding(
    magvit: tuple[MagvitTokenizer, MaskedTransformer],
) -> None:
    def run(**more: Any) -> torch.Tensor:
        return mf.generate(*magvit, task="frame_prediction", video=clip(1), steps=3, **more)

    # one value left: the most likely one
    surest = run(temperature=0.0, choice_temperature=0.0)
    assert torch.equal(run(top_k=1, choice_temperature=0.0), surest)
    assert not torch.equal(run(top_p=0.3), run())
    tokenizer, transformer = magvit
    task, geometry = TASKS["frame_prediction"], clip_geometry(tokenizer, transformer)
    ids = tokenizer.encode(task.condition_video(clip(1), geometry))
    settings = MaskedDecoding(steps=3, fixed_condition=True)
    made = generate_tokens(tokenizer, transformer, task, settings, video=clip(1))
    inside = task.token_mask(geometry).expand_as(ids)
    assert torch.equal(made[inside], ids[inside])
    expected = tokenizer.decode(made)
    torch.testing.assert_close(run(condition_mode="fixed"), expected)
    # latent masking: the true tokens of the region, which need the whole clip
    whole = clip(20)
    latent = mf.generate(
        *magvit, task="frame_prediction", video=whole, steps=3, condition_mode="latent"
    )
    true = tokenizer.encode(whole[:, :, :16])
    assert not torch.equal(true[inside], ids[inside])
    made = generate_tokens(tokenizer, transformer, task, settings, video=whole, true_condition=True)
    assert torch.equal(made[inside], true[inside])
    assert not torch.equal(made[~inside], true[~inside])
    torch.testing.assert_close(latent, tokenizer.decode(made))
    for change, message in (
        ({"condition_mode": "latent"}, "needs the true clip, 16 frames, .* got 1 frames for 1"),
        (
            {"condition_mode": "prefix"},
            "condition_mode: expected one of 'commit', 'latent', 'fixed'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(**change)
    with pytest.raises(ValueError, match="got 16 frames for 2 clips"):
        mf.generate(
            *magvit, task="frame_prediction", video=clip(16), frames=20, condition_mode="latent"
        )


@pytest.mark.parametrize(
    "schedule", ["cosine", "uniform", "exp", "log", "pow0.5", "pow3", "poly:-1,0,1"]
)
def test_every_schedule_decodes(
    schedule: str, magvit: tuple[MagvitTokenizer, MaskedTransformer]
) -> None:
    """No pass sees more MASKs than the schedule leaves, and passes end when no token is unknown."""
    tokenizer, transformer = magvit
    task, masks = TASKS["frame_prediction"], []
    hook = transformer.register_forward_pre_hook(lambda _m, args: masks.append(args[1]))
    settings = MaskedDecoding(steps=12, schedule=schedule)
    ids = generate_tokens(tokenizer, transformer, task, settings, video=clip(1))
    hook.remove()
    counts = [64, *settings.counts(64)]
    assert counts[-1] == 0
    region = task.token_mask(clip_geometry(tokenizer, transformer)).flatten()
    for mask, count in zip(masks, counts, strict=False):
        assert mask.sum(1).max() <= count  # unknown condition tokens are shown, not masked
        assert not mask[:, region].any()
    assert ids.shape == (2, 4, 4, 4)
    assert len(masks) == len([n for n in counts if n])


def test_the_unconditional_branch_of_guidance(
    magvit: tuple[MagvitTokenizer, MaskedTransformer],
) -> None:
    """FULL_GENERATION where the model knows it, else the task's own prompt; no class; MASK for z~."""
    for known in (True, False):
        tokenizer, transformer = magvit
        if not known:
            transformer = make_transformer(
                grid=(4, 4, 4), num_subtokens=1, subtoken_size=16,
                prompts=("inpainting", "frame_prediction"),
            )  # fmt: skip
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
        hook = transformer.register_forward_pre_hook(
            lambda _m, args, kwargs, calls=calls: calls.append((args[1], kwargs)), with_kwargs=True
        )
        mf.generate(
            tokenizer, transformer, task="class_frame_prediction", video=clip(1), class_id=1,
            steps=2, guidance=1.0,
        )  # fmt: skip
        hook.remove()
        assert len(calls) == 4
        (shown, ours), (masked, free) = calls[:2]
        assert ours["prompt_id"] == 1
        assert free["prompt_id"] == (0 if known else 1)
        assert ours["class_id"].tolist() == [1, 1]
        assert free.get("class_id") is None
        assert not shown[:, :16].any()
        assert masked.all()


def test_magvit_predicts_long_videos_from_one_frame(
    magvit: tuple[MagvitTokenizer, MaskedTransformer],
) -> None:
    out = mf.generate(*magvit, task="frame_prediction", video=clip(1), steps=2, frames=40)
    assert out.shape == (2, 3, 40, 16, 16)


def test_models_of_different_systems_name_both(
    tokenizer: MagvitV2Tokenizer, magvit: tuple[MagvitTokenizer, MaskedTransformer]
) -> None:
    with pytest.raises(ValueError, match=r"1 x 16 sub-tokens hold 4 bits, .* have 6 bits"):
        mf.generate(tokenizer, magvit[1], task="frame_prediction", video=clip(), steps=2)
