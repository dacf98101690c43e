from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch

import magvit_fast as mf
from magvit_fast.decoding import MaskedDecoding, clip_geometry, generate_tokens
from magvit_fast.decoding.schedules import Guidance
from magvit_fast.models import (
    MagvitConfig,
    MagvitTokenizer,
    MagvitV2Config,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)
from magvit_fast.tasks import TASKS

SIZE = 16  # 17 frames of 16 x 16 pixels -> 5 x 4 x 4 tokens of 6 bits


@pytest.fixture(scope="module")
def tokenizer() -> MagvitV2Tokenizer:
    torch.manual_seed(0)
    config = MagvitV2Config(
        filters=4,
        channel_multipliers=(1, 1, 2),
        temporal_downsample=(True, True),
        num_res_blocks=1,
        num_bits=6,
    )
    return MagvitV2Tokenizer(config)


@pytest.fixture(scope="module")
def transformer() -> MaskedTransformer:
    return make_transformer()


def make_transformer(**changes: Any) -> MaskedTransformer:
    torch.manual_seed(1)
    config = MaskedTransformerConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, grid=(5, 4, 4), subtoken_size=8,
        num_classes=3, init_std=0.5,
    )  # fmt: skip
    return MaskedTransformer(dataclasses.replace(config, **changes))


def clip(frames: int = 17, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def test_presets_fit_each_other() -> None:
    with torch.device("meta"):
        for tokens, network, size in (
            ("magvit-v2-demo", "magvit-v2-demo", (17, 64, 64)),
            ("magvit-v2-base", "magvit-v2-l", (17, 128, 128)),
            ("magvit-v2-small", "magvit-v2-l", (17, 128, 128)),
        ):
            geometry = clip_geometry(
                MagvitV2Tokenizer.from_preset(tokens), MaskedTransformer.from_preset(network)
            )
            assert geometry.size == size
            assert geometry.causal


def test_frame_prediction(tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer) -> None:
    video = clip()
    run = lambda **more: mf.generate(  # noqa: E731
        tokenizer, transformer, task="frame_prediction", steps=4, **{"video": video, **more}
    )
    out = run()
    assert out.shape == video.shape
    assert not out.requires_grad
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(out, run())
    assert not torch.equal(out, run(seed=1))
    # only the given frames matter
    assert torch.equal(out, run(video=video[:, :, :5]))
    changed = torch.cat([video[:, :, :5], 1 - video[:, :, 5:]], dim=2)
    assert torch.equal(out, run(video=changed))
    assert not torch.equal(out, run(video=1 - video))


def test_the_modes_of_the_models_are_left_alone(tokenizer: MagvitV2Tokenizer) -> None:
    transformer = make_transformer(dropout=0.5)
    transformer.layers[0].eval()
    tokenizer.train()
    video = clip(5)
    outs = [
        mf.generate(tokenizer, transformer, task="frame_prediction", video=video, steps=2)
        for _ in range(2)
    ]
    assert torch.equal(*outs)  # no dropout inside
    assert transformer.training
    assert not transformer.layers[0].training
    assert tokenizer.training


@pytest.mark.parametrize("task", [n for n, t in TASKS.items() if t.has_condition])
def test_every_task_with_a_condition(
    task: str, tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    classes = 1 if TASKS[task].class_conditional else None
    video = clip()
    out = mf.generate(tokenizer, transformer, task=task, video=video, class_id=classes, steps=2)
    assert out.shape == video.shape


def test_class_generation(tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer) -> None:
    run = lambda ids, **more: mf.generate(  # noqa: E731
        tokenizer, transformer, task="class_generation", class_id=ids, steps=3, **more
    )
    assert run(2).shape == (1, 3, 17, SIZE, SIZE)
    both = run([2, 0])
    assert torch.equal(both, run(torch.tensor([2, 0])))
    assert torch.equal(both[:1], run([2, 1])[:1])
    assert not torch.equal(both, run([0, 2]))
    assert not torch.equal(both, run([2, 0], guidance=3.0))
    assert torch.equal(run(1, guidance=3.0), run(1, guidance=Guidance(3.0)))


def test_long_videos_by_sliding(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    video = clip(5)
    run = lambda frames: mf.generate(  # noqa: E731
        tokenizer, transformer, task="frame_prediction", video=video, steps=2, frames=frames
    )
    one, long = run(None), run(40)
    assert long.shape[2] == 40
    assert torch.equal(long[:, :, :17], one)
    assert torch.equal(run(10), one[:, :, :10])
    assert torch.equal(run(29), long[:, :, :29])  # exactly two windows


@pytest.mark.parametrize("given", [5, 9, 13])
def test_long_videos_are_the_whole_decode_of_their_tokens(
    given: int, tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    """By hand: each window from the frames of what is there, its new slots behind the others."""
    task = dataclasses.replace(TASKS["frame_prediction"], first=given)
    new = 17 - given
    made = mf.generate(
        tokenizer, transformer, task=task, video=clip(given), steps=2, frames=17 + 2 * new
    )
    slots: list[torch.Tensor] = []
    video = clip(given)
    for window in range(3):
        ids = generate_tokens(
            tokenizer, transformer, task, MaskedDecoding(steps=2), video=video,
            first_step=2 * window,
        )  # fmt: skip
        slots.append(ids if window == 0 else ids[:, 1 + (given - 1) // 4 :])
        video = made[:, :, : 17 + window * new][:, :, -given:]
    whole = tokenizer.decode(torch.cat(slots, dim=1)).detach()
    assert whole.shape == made.shape
    torch.testing.assert_close(made, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "positions", "size"),
    [((5, 2, 3), "corner", (8, 12)), ((3, 4, 4), "corner", (16, 16)),
     ((5, 4, 7), "interpolate", (16, 28)), ((7, 4, 4), "interpolate", (16, 16))],
)  # fmt: skip
def test_other_sizes_and_lengths(
    grid: Any,
    positions: Any,
    size: tuple[int, int],
    tokenizer: MagvitV2Tokenizer,
    transformer: MaskedTransformer,
) -> None:
    """The tokenizer takes any size; the transformer by its corner, or by interpolated positions."""
    model = transformer.with_grid(grid, positions)
    frames = 1 + 4 * (grid[0] - 1)
    video = torch.rand(1, 3, 5, *size, generator=torch.Generator().manual_seed(0))
    run = {"task": "frame_prediction", "video": video, "steps": 2}
    out = mf.generate(tokenizer, model, **run)  # type: ignore[arg-type]
    assert out.shape == (1, 3, frames, *size)
    long = mf.generate(tokenizer, model, **run, frames=frames + 3)  # type: ignore[arg-type]
    assert torch.equal(long[:, :, :frames], out)
    if size != (16, 16):
        with pytest.raises(ValueError, match=r"expected 16x16 pixels .* by with_grid"):
            mf.generate(tokenizer, transformer, **run)  # type: ignore[arg-type]


@pytest.mark.parametrize(("task", "seen"), [("frame_prediction", 5), ("class_frame_prediction", 5),
                                           ("frame_interpolation", 17), ("outpainting_central", 17)])  # fmt: skip
def test_a_causal_tokenizer_sees_the_frames_of_the_condition_alone(
    task: str,
    seen: int,
    tokenizer: MagvitV2Tokenizer,
    transformer: MaskedTransformer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its tokens inside the region are those of the whole condition clip."""
    encoded: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda video: encoded.append(video) or encode(video))
    hook = transformer.register_forward_pre_hook(lambda _m, args: shown.append(args[0]))
    classes = 1 if task.startswith("class") else None
    mf.generate(tokenizer, transformer, task=task, video=clip(), class_id=classes, steps=1)
    hook.remove()
    assert [video.shape[2] for video in encoded] == [seen]
    chosen, geometry = TASKS[task], clip_geometry(tokenizer, transformer)
    whole = encode(chosen.condition_video(clip(), geometry)).flatten(1)
    region = chosen.token_mask(geometry).flatten()
    # a bit near zero may fall either way in another order of sums
    assert (shown[0][:, region] == whole[:, region]).float().mean() > 0.99


def test_given_frames_within_a_slot_decode_each_clip_by_itself(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    task = dataclasses.replace(TASKS["frame_prediction"], first=3)
    made = mf.generate(tokenizer, transformer, task=task, video=clip(3), steps=2, frames=31)
    settings = MaskedDecoding(steps=2)
    ids = generate_tokens(
        tokenizer, transformer, task, settings, video=made[:, :, 14:17], first_step=2
    )
    torch.testing.assert_close(made[:, :, 17:], tokenizer.decode(ids)[:, :, 3:].detach())


def test_pieces_come_when_they_are_asked_for(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer
) -> None:
    passes: list[int] = []
    hook = transformer.register_forward_hook(lambda *_: passes.append(1))
    arguments: dict[str, Any] = {
        "task": "frame_prediction", "video": clip(5), "steps": 2, "frames": 60,
    }  # fmt: skip
    transformer.train()
    try:
        stream = mf.decoding.generate_stream(tokenizer, transformer, **arguments)
        assert passes == []
        first = next(stream)
        assert len(passes) == 2
        assert first.shape[2] < 60
        assert transformer.training  # not changed between pieces
        assert not first.requires_grad
        rest = list(stream)
    finally:
        hook.remove()
        transformer.eval()
    assert len(passes) == 2 * 5
    whole = torch.cat([first, *rest], dim=2)
    assert torch.equal(whole, mf.generate(tokenizer, transformer, **arguments))
    with pytest.raises(ValueError, match="steps: expected 1 or more"):  # at once
        mf.decoding.generate_stream(tokenizer, transformer, **{**arguments, "steps": 0})


def test_what_is_made_is_not_kept(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the decoded pieces and token grids of ten windows only the newest are alive."""
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    whole = tokenizer.decode_stream

    def watched(ids: torch.Tensor, **more: Any) -> Any:
        seen.append(weakref.ref(ids))
        for piece in whole(ids, **more):
            seen.append(weakref.ref(piece))
            yield piece

    monkeypatch.setattr(tokenizer, "decode_stream", watched)
    frames = 0
    for piece in mf.decoding.generate_stream(
        tokenizer, transformer, task="frame_prediction", video=clip(5), steps=1, frames=17 + 12 * 9
    ):
        frames += piece.shape[2]
        alive.append(sum(ref() is not None for ref in seen))
    assert frames == 17 + 12 * 9
    assert len(seen) > 20
    assert max(alive) <= 4


def test_prompts_reach_the_transformer(tokenizer: MagvitV2Tokenizer) -> None:
    model = make_transformer(prompts=("frame_prediction", "outpainting"))
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["prompt_id"]), with_kwargs=True
    )
    mf.generate(tokenizer, model, task="outpainting_vertical", video=clip(), steps=2)
    assert seen == [1, 1]
    mf.generate(tokenizer, model, task="frame_prediction", video=clip(), steps=1, guidance=1.0)
    assert seen[2:] == [0, 0]
    with pytest.raises(ValueError, match="task: expected one of the model's prompts"):
        mf.generate(tokenizer, model, task="inpainting_central", video=clip())


def test_injected_noise(tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer) -> None:
    noise = [(torch.randn(2, 80, 2, 8), torch.randn(2, 80)) for _ in range(2)]
    run = lambda **more: mf.generate(  # noqa: E731
        tokenizer, transformer, task="frame_prediction", video=clip(), steps=2, noise=noise, **more
    )
    assert torch.equal(run(seed=1), run(seed=2))
    with pytest.raises(ValueError, match="noise: expected None for a result of 2 clips"):
        run(frames=20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": "predict"}, ValueError, "task: expected one of frame_prediction, .*'predict'"),
        ({"video": None}, ValueError, r"frame_prediction needs one of at least 5 frames of 16x16"),
        ({"video": clip(4)}, ValueError, "needs at least 5 frames, got 4"),
        (
            {"video": clip()[..., :8]},
            ValueError,
            r"expected 16x16 pixels \(the transformer's 4x4 tokens .*\), got 16x8",
        ),
        ({"video": clip()[0]}, ValueError, r"video: expected \[B, C, T, H, W\]"),
        ({"video": clip() * 255}, ValueError, r"video: expected values in \[0, 1\]"),
        ({"video": clip() * float("nan")}, ValueError, r"video: expected values in \[0, 1\]"),
        ({"video": clip().byte()}, TypeError, "video: expected a floating-point Tensor"),
        ({"class_id": 1}, ValueError, "class_id: expected None, task frame_prediction takes no"),
        ({"frames": 0}, ValueError, "frames: expected 1 or more, got 0"),
        ({"frames": 20.0}, TypeError, "frames: expected an int, got float 20.0"),
        ({"task": None}, TypeError, "task: expected a name or a Task, got NoneType"),
        ({"steps": 0}, ValueError, "steps: expected 1 or more, got 0"),
        ({"steps": 2.5}, TypeError, "steps: expected an int, got float 2.5"),
        ({"seed": -1}, ValueError, "seed: expected 0 or more, got -1"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got float 0.5"),
        ({"guidance": "much"}, TypeError, "guidance: expected a number, got str 'much'"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        (
            {"schedule": "sawtooth"},
            ValueError,
            r"schedule: expected one of uniform \(linear\), cosine",
        ),
        ({"guidance": -1.0}, ValueError, "guidance: expected a scale of 0 or more"),
        ({"choice_temperature": -1.0}, ValueError, "choice_temperature: expected"),
        (
            {"task": "class_generation", "class_id": 1},
            ValueError,
            "video: expected None, task class_generation takes no video",
        ),
        (
            {"task": "class_generation", "video": None},
            ValueError,
            r"class_id: task class_generation needs one in 0\.\.2, got None",
        ),
        (
            {"task": "class_frame_prediction", "class_id": 3},
            ValueError,
            r"class_id: expected ids in 0\.\.2, got \[3\]",
        ),
        (
            {"task": "class_frame_prediction", "class_id": [0, 1, 2]},
            ValueError,
            "class_id: expected one id or 2, got 3",
        ),
        (
            {"task": "class_frame_prediction", "class_id": "cat"},
            TypeError,
            "class_id: expected an int or ints, got 'cat'",
        ),
        ({"task": "class_frame_prediction", "class_id": 0.5}, TypeError, "class_id: expected ints"),
        (
            {"task": "outpainting_central", "frames": 30},
            ValueError,
            "outpainting_central makes one clip of 17 frames, got 30",
        ),
    ],
)
def test_bad_input_names_both_sides(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    tokenizer: MagvitV2Tokenizer,
    transformer: MaskedTransformer,
) -> None:
    arguments = {"task": "frame_prediction", "video": clip(), **change}
    with pytest.raises(error, match=message):
        mf.generate(tokenizer, transformer, **arguments)


def test_models_that_do_not_fit(tokenizer: MagvitV2Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"2 x 16 sub-tokens hold 8 bits, but the .* have 6 bits"):
        mf.generate(
            tokenizer, make_transformer(subtoken_size=16), task="frame_prediction", video=clip()
        )
    # another grid is another size of video
    with pytest.raises(
        ValueError, match=r"expected 8x16 pixels \(the transformer's 2x4 tokens .* got 16x16"
    ):
        mf.generate(
            tokenizer, make_transformer(grid=(5, 2, 4)), task="frame_prediction", video=clip()
        )
    with pytest.raises(ValueError, match="it has no classes"):
        mf.generate(tokenizer, make_transformer(num_classes=0), task="class_generation", class_id=0)


@pytest.mark.cuda
def test_cuda_draws_the_tokens_of_the_cpu(tokenizer: MagvitV2Tokenizer) -> None:
    model, video = make_transformer(), clip(5)
    settings = MaskedDecoding(steps=6, seed=3)
    ids = []
    for device in ("cpu", "cuda"):
        tokenizer.to(device)
        model.to(device)
        ids.append(
            generate_tokens(
                tokenizer, model, TASKS["frame_prediction"], settings, video=video.to(device)
            ).cpu()
        )
    tokenizer.cpu()
    # the random numbers agree; a near tie may fall differently and change what follows
    assert (ids[0] == ids[1]).float().mean() > 0.9
    with pytest.raises(ValueError, match="video: expected device cuda"):
        mf.generate(tokenizer.cuda(), model, task="frame_prediction", video=video)
    with pytest.raises(ValueError, match="tokenizer: expected device cuda"):
        mf.generate(tokenizer.cpu(), model, task="frame_prediction", video=video)


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
