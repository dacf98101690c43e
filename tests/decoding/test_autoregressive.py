"""Autoregressive decoding: the cache changes nothing, noise decides, one pass a token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import magvit_fast as mf
from magvit_fast.decoding import (
    AutoregressiveDecoding,
    Guidance,
    MaskedDecoding,
    decode_autoregressive,
)
from magvit_fast.decoding.generate import generate_tokens
from magvit_fast.models import (
    AutoregressiveTransformer,
    MagvitConfig,
    MagvitTokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
)
from magvit_fast.nn.embedding import unpack_subtokens
from magvit_fast.tasks import TASKS

TINY = MaskedTransformerConfig(
    hidden_size=16, num_layers=2, num_heads=2, mlp_size=32, grid=(4, 4, 4), num_subtokens=1,
    subtoken_size=16, num_classes=3, init_std=0.5,
)  # fmt: skip


def make(**changes: Any) -> AutoregressiveTransformer:
    torch.manual_seed(1)
    return AutoregressiveTransformer(dataclasses.replace(TINY, **changes)).eval()


def gumbel(*shape: int, seed: int = 0) -> torch.Tensor:
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -torch.log(-torch.log(u)).float()


def count_passes(model: AutoregressiveTransformer) -> list[int]:
    """Grows by the number of positions of each pass."""
    seen: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    return seen


def test_guidance_is_not_rounded_to_bfloat16() -> None:
    model, seen = make(subtoken_size=256).bfloat16(), []
    model.register_forward_hook(lambda _m, _a, logits: seen.append(logits[:, -1, 0].double()))
    settings = AutoregressiveDecoding(temperature=0.0, guidance=Guidance(3.0))
    tokens = decode_autoregressive(model, settings, class_id=torch.tensor([0, 1, 2]))
    conditional, unconditional = (torch.stack(seen[i::2], 1) for i in (0, 1))
    exact = conditional + 3.0 * (conditional - unconditional)
    rounded = conditional.bfloat16() + 3.0 * (conditional - unconditional).bfloat16()
    assert (rounded.argmax(-1) != exact.argmax(-1)).any()
    assert torch.equal(tokens, exact.argmax(-1))


@pytest.mark.parametrize("subtokens", [1, 2])
@pytest.mark.parametrize("condition", [False, True])
def test_cached_logits_are_the_uncached_ones(subtokens: int, condition: bool) -> None:
    model = make(num_subtokens=subtokens, condition_tokens=5 if condition else 0).double()
    bits = model.config.num_bits
    tokens = torch.randint(0, 2**bits, (2, 64), generator=torch.Generator().manual_seed(2))
    prefix = {
        "class_id": torch.tensor([0, 3]),
        "condition": tokens[:, 9:14] if condition else None,
    }
    with torch.no_grad():
        whole = model(tokens, **prefix)
        assert whole.shape == (2, 64, subtokens, 16)
        for cuts in ([0, *range(64)], [0, 1, 2, 30, 63], [0, 63]):
            cache = model.new_cache()
            rows = [model(tokens[:, :0], **prefix, cache=cache)]
            rows += [
                model(tokens[:, a:b], **prefix, cache=cache) for a, b in itertools.pairwise(cuts)
                if b > a
            ]  # fmt: skip
            torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-10, rtol=1e-10)
        cache = model.new_cache()  # the prefix together with the first tokens
        rows = [model(tokens[:, a:b], **prefix, cache=cache) for a, b in ((0, 20), (20, 63))]
        torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-10, rtol=1e-10)


def test_a_token_sees_only_what_is_before_it() -> None:
    model = make(condition_tokens=4)
    tokens = torch.randint(0, 16, (1, 64), generator=torch.Generator().manual_seed(0))
    given = tokens[:, :4]
    base = model(tokens, condition=given)
    for i in (0, 17, 63):
        changed = tokens.clone()
        changed[:, i] ^= 1
        out = model(changed, condition=given)
        assert torch.equal(out[:, : i + 1], base[:, : i + 1])
        assert (i == 63) or (out[:, i + 1 :] != base[:, i + 1 :]).any(-1).all()
    assert not torch.isclose(model(tokens, condition=given ^ 1), base).all(-1).any()
    torch.testing.assert_close(model(tokens[:, :10], condition=given), base[:, :10])


@pytest.mark.parametrize("subtokens", [1, 2])
def test_sampling_with_given_noise_is_exact(subtokens: int) -> None:
    """Every token is argmax(logits / temperature + noise) under teacher forcing with the result."""
    model = make(num_subtokens=subtokens)
    classes, noise = torch.tensor([2, 1, 0]), gumbel(3, 64, subtokens, 16)
    for temperature in (1.0, 0.5, 0.0):
        settings = AutoregressiveDecoding(temperature=temperature)
        tokens = decode_autoregressive(model, settings, class_id=classes, noise=noise)
        with torch.no_grad():
            logits = model(tokens, class_id=classes)
        scores = logits if temperature == 0 else logits / temperature + noise
        best = scores.topk(2).values
        clear = (best[..., 0] - best[..., 1] > 1e-4).all(-1)
        assert clear.float().mean() > 0.95
        values = unpack_subtokens(tokens, subtokens, 16)
        assert torch.equal(values[clear], scores.argmax(-1)[clear])


def test_the_cache_does_not_change_the_tokens() -> None:
    model, classes = make().double(), torch.tensor([0, 1])
    runs = [
        decode_autoregressive(
            model, AutoregressiveDecoding(seed=5, cached=cached), class_id=classes
        )
        for cached in (True, False)
    ]
    assert torch.equal(*runs)
    other = decode_autoregressive(model, AutoregressiveDecoding(seed=6), class_id=classes)
    assert not torch.equal(runs[0], other)
    assert not torch.equal(runs[0][0], runs[0][1])


def test_one_pass_a_token() -> None:
    model = make(condition_tokens=16)
    seen = count_passes(model)
    given = torch.zeros(2, 16, dtype=torch.int64)
    decode_autoregressive(model, condition=given)
    assert seen == [18] + [1] * 63  # the prefix (class, 16 tokens, SEP), then token by token
    seen.clear()
    decode_autoregressive(model, AutoregressiveDecoding(cached=False), condition=given)
    assert seen == [18 + i for i in range(64)]


@pytest.mark.parametrize(
    "guidance", [Guidance(2.0), Guidance(3.0, "cosine_power", 1.0)], ids=["constant", "cosine"]
)
def test_guidance_is_over_the_logits(guidance: Guidance) -> None:
    """Every token is argmax(c + s (c - u) + noise), u without a class, under teacher forcing."""
    model = make(condition_tokens=4).double()
    given = torch.randint(0, 16, (2, 4), generator=torch.Generator().manual_seed(3))
    classes, noise = torch.tensor([2, 1]), gumbel(2, 64, 1, 16).double()
    runs = [
        decode_autoregressive(
            model, AutoregressiveDecoding(guidance=guidance, cached=cached),
            class_id=classes, condition=given, noise=noise,
        )
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(*runs)
    plain = decode_autoregressive(model, class_id=classes, condition=given, noise=noise)
    assert not torch.equal(runs[0], plain)
    with torch.no_grad():
        own = model(runs[0], class_id=classes, condition=given)
        free = model(runs[0], condition=given)
    scales = torch.tensor([guidance.at((i + 1) / 64) for i in range(64)]).double()
    guided = own + scales[:, None, None] * (own - free)
    assert torch.equal(unpack_subtokens(runs[0], 1, 16), (guided + noise).argmax(-1))


def test_guidance_takes_a_second_pass_and_the_free_prompt(tokenizer: MagvitTokenizer) -> None:
    model = make(prompts=("frame_prediction", "class_generation"))
    seen = count_passes(model)
    decode_autoregressive(model, AutoregressiveDecoding(guidance=Guidance(1.0)), prompt_id=0)
    assert len(seen) == 128
    prompts: list[Any] = []
    model.register_forward_pre_hook(
        lambda _m, _args, given: prompts.append((given["class_id"] is None, given["prompt_id"])),
        with_kwargs=True,
    )
    mf.generate(tokenizer, model, task="class_generation", class_id=1, guidance=1.5)
    assert prompts == [(False, 1), (True, 1)] * 64


def test_the_draws_follow_the_distribution() -> None:
    """The first token of many clips against the network's own probabilities."""
    model = make(init_std=0.3)
    with torch.no_grad():
        p = model(torch.zeros(1, 1, dtype=torch.int64)).softmax(-1)[0, 0, 0]
    small = make(init_std=0.3, grid=(1, 1, 1))
    small.load_state_dict(
        {**model.state_dict(), "position_embedding": model.position_embedding[:1].detach()}
    )
    drawn = decode_autoregressive(small, AutoregressiveDecoding(seed=3), batch=20_000)
    share = torch.bincount(drawn.flatten(), minlength=16) / 20_000
    assert (share - p).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_cuts() -> None:
    model = make()
    surest = decode_autoregressive(model, AutoregressiveDecoding(temperature=0.0))
    assert torch.equal(decode_autoregressive(model, AutoregressiveDecoding(top_k=1)), surest)
    drawn = decode_autoregressive(model, AutoregressiveDecoding(top_k=3, seed=1))
    with torch.no_grad():
        ranks = model(drawn).argsort(-1, descending=True).argsort(-1)
    assert ranks[:, :, 0].gather(-1, drawn.unsqueeze(-1)).max() < 3
    assert not torch.equal(drawn, surest)


@pytest.fixture(scope="module")
def tokenizer() -> MagvitTokenizer:
    torch.manual_seed(3)
    return MagvitTokenizer(
        MagvitConfig(
            filters=4, channel_multipliers=(1, 1, 2), temporal_downsample=(True, True),
            num_res_blocks=1, norm_groups=2, codebook_size=16, embedding_dim=4,
        )
    )  # fmt: skip


def test_generation(tokenizer: MagvitTokenizer) -> None:
    made = mf.generate(tokenizer, make(), task="class_generation", class_id=[0, 2])
    assert made.shape == (2, 3, 16, 16, 16)
    video = torch.rand(2, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    model = make(condition_tokens=16)

    def run(**more: Any) -> torch.Tensor:
        settings = {"task": "frame_prediction", "video": video, **more}
        return mf.generate(tokenizer, model, **settings)

    out = run()
    assert out.shape == video.shape
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(out, run(video=video[:, :, :1]))  # what is not given does not matter
    assert not torch.equal(out, run(video=1 - video))
    assert torch.equal(out, run(steps=3, schedule="uniform"))
    noise = gumbel(2, 64, 1, 16)
    assert torch.equal(run(noise=noise, seed=1), run(noise=noise, seed=2))
    long = run(frames=40)
    assert long.shape[2] == 40
    assert torch.equal(long[:, :, :16], out)
    # the prefix is z~ of the region
    task, geometry = TASKS["frame_prediction"], mf.decoding.clip_geometry(tokenizer, model)
    ids = tokenizer.encode(task.condition_video(video, geometry)).flatten(1)[:, :16]
    tokens = decode_autoregressive(model, AutoregressiveDecoding(), condition=ids)
    assert torch.equal(tokenizer.decode(tokens.view(-1, 4, 4, 4)), out)


def test_bad_input(tokenizer: MagvitTokenizer) -> None:
    model = make(condition_tokens=16)
    video = torch.rand(1, 3, 16, 16, 16)
    for change, error, message in (
        (
            {"task": "frame_interpolation"},
            ValueError,
            "its prefix holds 16 condition tokens, but the region of task frame_interpolation has 32",
        ),
        ({"condition_mode": "fixed"}, ValueError, "expected 'commit' for an autoregressive"),
        ({"noise": []}, TypeError, "noise: expected Tensor for this transformer, got list"),
        ({"noise": torch.zeros(1, 64, 1, 8)}, ValueError, r"noise: expected \(1, 64, 1, 16\)"),
        ({"top_k": 2, "top_p": 0.5}, ValueError, "top_k and top_p"),
    ):
        with pytest.raises(error, match=message):
            mf.generate(tokenizer, model, **{"task": "frame_prediction", "video": video, **change})
    with pytest.raises(ValueError, match=r"holds 0 condition tokens, .* frame_prediction has 16"):
        mf.generate(tokenizer, make(), task="frame_prediction", video=video)
    masked = MaskedTransformer(TINY)
    with pytest.raises(TypeError, match="settings, noise: expected MaskedDecoding"):
        generate_tokens(
            tokenizer, masked, TASKS["class_generation"], AutoregressiveDecoding(),
            classes=torch.tensor([0]),
        )  # fmt: skip
    with pytest.raises(TypeError, match="settings, noise: expected AutoregressiveDecoding"):
        generate_tokens(
            tokenizer,
            make(),
            TASKS["class_generation"],
            MaskedDecoding(),
            classes=torch.tensor([0]),
        )
    for bad in ({"temperature": -1.0}, {"top_p": 2.0}, {"seed": -1}, {"top_k": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AutoregressiveDecoding(**bad)  # type: ignore[arg-type]
    tokens, cache = torch.zeros(1, 64, dtype=torch.int64), model.new_cache()
    given = tokens[:, :16]
    with pytest.raises(ValueError, match=r"condition: expected 16 tokens a sample .* got None"):
        model(tokens)
    with pytest.raises(ValueError, match=r"condition: expected \[1, 16\], got \(1, 15\)"):
        model(tokens, condition=given[:, 1:])
    with pytest.raises(TypeError, match="condition: expected int64"):
        model(tokens, condition=given.int())
    with pytest.raises(ValueError, match=r"condition: expected None .* condition_tokens 0, got"):
        make()(tokens, condition=given)
    with pytest.raises(ValueError, match=r"at most 63 inputs .* which makes 64"):
        model(tokens, condition=given, cache=cache)
    with pytest.raises(ValueError, match=r"at most 63 inputs .* which makes 64"):
        model(torch.zeros(1, 65, dtype=torch.int64), condition=given)
    with pytest.raises(ValueError, match=r"tokens: expected \[B, n\] with n >= 1"):
        model(tokens[:, :0], condition=given)
    with pytest.raises(ValueError, match="condition_tokens: expected 0 to 64"):
        make(condition_tokens=65)
