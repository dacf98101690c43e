"""mf.generate with a MAGVIT-v2 pair: tasks, classes, prompts, and bad input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.decoding.pairs import SIZE, clip, make_transformer

import magvit_fast as mf
from magvit_fast.decoding import MaskedDecoding, clip_geometry, generate_tokens
from magvit_fast.decoding.schedules import Guidance
from magvit_fast.models import (
    MagvitV2Tokenizer,
    MaskedTransformer,
)
from magvit_fast.tasks import TASKS


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


def test_norms_over_the_clip_see_the_whole_condition_clip(
    tokenizer: MagvitV2Tokenizer, transformer: MaskedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training; and nothing behind the given frames."""
    model = MagvitV2Tokenizer(dataclasses.replace(tokenizer.config, clip_norms=True))
    model.load_state_dict(tokenizer.state_dict())
    encoded: list[torch.Tensor] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda video: encoded.append(video) or encode(video))
    outs = [
        mf.generate(model, transformer, task="frame_prediction", video=video, steps=2)
        for video in (clip(), clip()[:, :, :5])
    ]
    assert torch.equal(*outs)
    padded = TASKS["frame_prediction"].condition_video(clip(), clip_geometry(model, transformer))
    assert len(encoded) == 2
    assert all(torch.equal(video, padded) for video in encoded)


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
