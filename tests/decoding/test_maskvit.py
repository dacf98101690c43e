"""MaskViT's iterative decoding, against a plain float64 loop and by counting passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import magvit_fast as mf
from magvit_fast.decoding import MaskViTDecoding, decode_frames
from magvit_fast.decoding.confidence import probability, remask
from magvit_fast.decoding.masked import MaskedDecoding, masked_decoding_steps
from magvit_fast.decoding.maskvit import frame_predict, known_frames
from magvit_fast.decoding.schedules import masked_counts
from magvit_fast.tasks import TASKS, ClipGeometry


@dataclass(frozen=True)
class Shape:
    frames: int = 4
    grid: tuple[int, int] = (3, 2)
    codebook_size: int = 8
    action_dim: int = 0


class Tables:
    """Logits from the position, the token there, the one before it and the action of the frame."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, **shape: Any) -> None:
        self.config = Shape(**shape)
        c, generator = self.config, torch.Generator().manual_seed(seed)
        draw = lambda *n: torch.randn(*n, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.place = 2 * draw(c.frames * math.prod(c.grid), c.codebook_size)
        self.token = 2 * draw(c.codebook_size + 1, c.codebook_size)
        self.action = draw(max(c.action_dim, 1), c.codebook_size)
        self.passes = 0
        self.seen: list[torch.Tensor] = []

    def __call__(
        self, ids: torch.Tensor, unknown: torch.Tensor, *, actions: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.passes += 1
        shown = torch.where(unknown, self.config.codebook_size, ids)
        self.seen.append(shown)
        flat = shown.flatten(1)
        logits = self.place[: flat.shape[1]] + self.token[flat] + self.token[flat.roll(1, 1)] / 2
        logits = logits.view(*ids.shape, -1)
        if actions is not None:
            logits = logits + (actions.to(logits.dtype) @ self.action)[:, :, None, None]
        return logits


def by_hand(
    model: Tables,
    ids: np.ndarray,
    known: np.ndarray,
    config: MaskViTDecoding,
    noise: list[tuple[np.ndarray, np.ndarray]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, masked) after each pass, one clip and one token at a time in float64."""
    batch, per_frame = ids.shape[0], math.prod(ids.shape[2:])
    tokens = ids.reshape(batch, -1).copy()
    masked = np.repeat(~known, per_frame)[None].repeat(batch, 0)
    future = int(masked[0].sum())
    states = []
    for t in range(1, config.steps + 1):
        x = t / config.steps
        fraction = {
            "cosine": math.cos(math.pi * x / 2),
            "linear": 1 - x,
            "square": 1 - x**2,
            "cubic": 1 - x**3,
            "square_root": 1 - math.sqrt(x),
        }[str(config.schedule)]
        keep_masked = 0 if t == config.steps else math.ceil(future * fraction - 1e-9)
        logits = model(
            torch.from_numpy(tokens.reshape(ids.shape)), torch.from_numpy(masked.reshape(ids.shape))
        ).numpy()
        logits = logits.reshape(batch, tokens.shape[1], -1)
        new_masked = masked.copy()
        for b in range(batch):
            scores = []
            for i in np.flatnonzero(masked[b]):
                row = logits[b, i]
                if config.temperature > 0:
                    value = int(np.argmax(row / config.temperature + noise[t - 1][0][b, i, 0]))
                else:
                    value = int(np.argmax(row))
                tokens[b, i] = value
                p = float(np.exp(row[value]) / np.exp(row).sum())
                score = p if config.confidence == "probability" else math.log(p)
                scores.append(
                    (score + config.choice_temperature * (1 - x) * noise[t - 1][1][b, i], i)
                )
            scores.sort()
            stay = {i for _, i in scores[:keep_masked]}
            for _, i in scores:
                new_masked[b, i] = i in stay
        masked = new_masked
        states.append((tokens.copy(), masked.copy()))
    return states


def gumbels(steps: int, batch: int, tokens: int, values: int) -> list[tuple[Any, Any]]:
    generator = np.random.default_rng(5)
    return [
        (generator.gumbel(size=(batch, tokens, 1, values)), generator.gumbel(size=(batch, tokens)))
        for _ in range(steps)
    ]


@pytest.mark.parametrize("confidence", ["probability", "log_probability"])
@pytest.mark.parametrize(
    ("schedule", "steps", "temperature", "choice", "given"),
    [
        ("cosine", 5, 1.0, 4.5, [0]),
        ("square", 4, 1.0, 0.3, [0, 1]),
        ("cubic", 6, 0.7, 1.0, [0, 3]),
        ("linear", 3, 0.0, 2.0, [0]),
        ("square_root", 5, 1.0, 0.0, [0]),
        ("cosine", 1, 1.0, 4.5, [1]),
    ],
)
def test_equals_a_plain_loop_in_float64(
    confidence: Any, schedule: str, steps: int, temperature: float, choice: float, given: list[int]
) -> None:
    model = Tables()
    config = MaskViTDecoding(
        steps=steps, schedule=schedule, temperature=temperature, choice_temperature=choice,
        confidence=confidence,
    )  # fmt: skip
    ids = torch.randint(0, 8, (3, 4, 3, 2), generator=torch.Generator().manual_seed(1))
    known = torch.zeros(4, dtype=torch.bool)
    known[given] = True
    noise = gumbels(steps, 3, 24, 8)
    expected = by_hand(model, ids.numpy(), known.numpy(), config, noise)
    given_noise = [(torch.from_numpy(v), torch.from_numpy(c)) for v, c in noise]
    states = masked_decoding_steps(
        frame_predict(model, 4), ids.flatten(1), known.repeat_interleave(6), config,
        noise=given_noise,
    )  # fmt: skip
    count = 0
    for state, (tokens, masked) in zip(states, expected, strict=True):
        assert torch.equal(state.tokens, torch.from_numpy(tokens)), state.step
        assert torch.equal(state.unknown, torch.from_numpy(masked)), state.step
        count += 1
    assert count == steps
    out = decode_frames(model, ids, known, config, noise=given_noise)
    assert torch.equal(out.flatten(1), torch.from_numpy(expected[-1][0]))
    assert torch.equal(out[:, known], ids[:, known])  # given frames stay


def test_the_two_readings_of_the_confidence_differ_and_agree_without_noise() -> None:
    ids, known = torch.zeros(4, 4, 3, 2, dtype=torch.int64), torch.tensor([True] + [False] * 3)

    def run(confidence: Any, choice: float) -> torch.Tensor:
        config = MaskViTDecoding(steps=6, choice_temperature=choice, confidence=confidence)
        return decode_frames(Tables(), ids, known, config)

    assert torch.equal(run("probability", 0.0), run("log_probability", 0.0))
    assert not torch.equal(run("probability", 0.5), run("log_probability", 0.5))


def test_probabilities_of_packed_tokens() -> None:
    logits = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    p = logits.softmax(-1)
    for b in range(2):
        for n in range(5):
            low, high = int(tokens[b, n]) % 8, int(tokens[b, n]) // 8
            expected = p[b, n, 0, low] * p[b, n, 1, high]
            torch.testing.assert_close(probability(logits, tokens)[b, n], expected)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_seeded_draws_are_those_of_the_op(impl: str) -> None:
    """Noise on p orders by p + T * G with the op's own numbers, whatever runs."""
    from magvit_fast import _native
    from magvit_fast.decoding.confidence import choice_noise

    logits = torch.randn(2, 40, 1, 16, generator=torch.Generator().manual_seed(2))
    tokens, unknown = torch.zeros(2, 40, dtype=torch.int64), torch.ones(2, 40, dtype=torch.bool)
    unknown[:, :7] = False
    with _native.default_impl(impl):
        new, left = remask(
            logits, tokens, unknown, num_unknown=11, confidence="probability", temperature=1.0,
            choice_temperature=0.8, seed=9, step=3, noise=None,
        )  # fmt: skip
        sampled, _ = mf.confidence_remask(logits, tokens, unknown, num_unknown=0, seed=9, step=3)
    assert torch.equal(new, sampled)
    assert torch.equal(new[:, :7], tokens[:, :7])
    p = logits.squeeze(2).softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
    scores = p + 0.8 * choice_noise(p.shape, p.device, 9, 3)
    for b in range(2):
        order = [i for i in scores[b].argsort().tolist() if i >= 7]
        assert sorted(order[:11]) == left[b].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # ceil(1024 * g(t / 8)), worked by hand
        ("cosine", [1005, 947, 852, 725, 569, 392, 200, 0]),
        ("linear", [896, 768, 640, 512, 384, 256, 128, 0]),
        ("square", [1008, 960, 880, 768, 624, 448, 240, 0]),
        ("cubic", [1022, 1008, 970, 896, 774, 592, 338, 0]),
        ("square_root", [662, 512, 397, 300, 215, 138, 67, 0]),
    ],
)
def test_counts(schedule: str, expected: list[int]) -> None:
    assert masked_counts(schedule, 1024, 8) == expected
    assert MaskViTDecoding(steps=8, schedule=schedule).counts(1024) == expected


def test_exact_products_are_not_rounded_up() -> None:
    assert masked_counts("cosine", 1024, 3)[1] == 512  # cos(pi / 3) = 1/2 in the reals alone
    assert masked_counts("linear", 3840, 24) == [3840 - 160 * t for t in range(1, 25)]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 5000),
    steps=st.integers(1, 64),
    schedule=st.sampled_from(["cosine", "linear", "square", "cubic", "square_root", "exp", "log"]),
)
def test_counts_fall_to_zero(tokens: int, steps: int, schedule: str) -> None:
    counts = masked_counts(schedule, tokens, steps)
    assert len(counts) == steps
    assert counts == sorted(counts)[::-1]
    assert counts[-1] == 0
    assert all(0 < n <= tokens for n in counts[:-1])


@pytest.mark.parametrize(
    ("given", "predicted", "passes", "ratio"),
    [(1, 15, 24, 160.0), (1, 15, 12, 320.0), (5, 25, 48, 133.3), (2, 10, 5, 512.0)],
    ids=["BAIR", "BAIR with actions", "KITTI", "RoboNet"],
)
def test_forward_passes_of_the_papers_table(
    given: int, predicted: int, passes: int, ratio: float
) -> None:
    """MaskViT's passes at full size; the baseline's, one a token, on frames of 16 tokens for 256."""

    def passes_of(grid: tuple[int, int], config: MaskViTDecoding) -> int:
        model = Tables(frames=given + predicted, grid=grid, codebook_size=2)
        ids = torch.zeros(1, given + predicted, *grid, dtype=torch.int64)
        decode_frames(model, ids, torch.arange(ids.shape[1]) < given, config)
        return model.passes

    assert passes_of((16, 16), MaskViTDecoding(steps=passes)) == passes
    one_by_one = tuple(range(predicted * 16 - 1, -1, -1))
    counted = passes_of((4, 4), MaskViTDecoding(steps=len(one_by_one), schedule=one_by_one))
    assert counted == predicted * 16
    assert round(counted * 16 / passes, 1) == ratio


def test_only_masked_tokens_hide_and_the_given_ones_are_seen() -> None:
    model = Tables()
    ids = torch.randint(0, 8, (2, 4, 3, 2), generator=torch.Generator().manual_seed(3))
    known = torch.tensor([True, False, False, True])
    out = decode_frames(model, ids, known, MaskViTDecoding(steps=4))
    first = model.seen[0]
    assert torch.equal(first[:, known], ids[:, known])
    assert (first[:, ~known] == 8).all()  # all future tokens start as MASK
    before = first
    for shown in model.seen[1:]:
        kept = before != 8
        assert torch.equal(shown[kept], before[kept])  # what is kept stays kept
        before = shown
    assert torch.equal(out[before != 8], before[before != 8])


def test_seeds_batches_and_actions() -> None:
    ids, known = torch.zeros(3, 4, 3, 2, dtype=torch.int64), torch.arange(4) < 1
    run = lambda **c: decode_frames(Tables(), ids, known, MaskViTDecoding(steps=4, **c))  # noqa: E731
    assert torch.equal(run(seed=1), run(seed=1))
    assert not torch.equal(run(seed=1), run(seed=2))
    assert not torch.equal(run()[0], run()[1])  # the clips of a batch are drawn apart
    planning = MaskViTDecoding.for_planning()
    assert (planning.steps, planning.choice_temperature, planning.temperature) == (5, 0.0, 0.0)
    model = Tables(action_dim=2)
    actions = torch.zeros(3, 4, 2)
    actions[1:, 2] = 3.0
    out = decode_frames(model, ids, known, planning, actions=actions)
    assert torch.equal(out[1], out[2])  # a prediction is a function of its actions
    assert not torch.equal(out[0], out[1])
    shorter = decode_frames(model, ids[:, :3], known[:3], planning, actions=actions[:, :3])
    assert shorter.shape == (3, 3, 3, 2)


GEOMETRY = ClipGeometry(6, 32, 32, (6, 4, 4), causal=False)


def test_known_frames_of_tasks_and_goals() -> None:
    import dataclasses

    first_two = dataclasses.replace(TASKS["frame_prediction"], first=2)
    as_list = lambda *a: known_frames(*a).int().tolist()  # noqa: E731
    assert as_list(TASKS["frame_prediction"], GEOMETRY) == [1, 0, 0, 0, 0, 0]
    assert as_list(first_two, GEOMETRY) == [1, 1, 0, 0, 0, 0]
    assert as_list(first_two, GEOMETRY, True) == [1, 1, 0, 0, 0, 1]
    assert as_list(TASKS["frame_interpolation"], GEOMETRY) == [1, 0, 0, 0, 0, 1]
    for name in ("outpainting_central", "class_generation", "class_frame_prediction"):
        with pytest.raises(ValueError, match=f"expected frame_prediction or .* got {name}"):
            known_frames(TASKS[name], GEOMETRY)
    with pytest.raises(ValueError, match="goal: expected None, task frame_interpolation takes"):
        known_frames(TASKS["frame_interpolation"], GEOMETRY, True)
    five = dataclasses.replace(first_two, first=5)
    with pytest.raises(ValueError, match="goal: 6 given frames leave none of 6 to predict"):
        known_frames(five, GEOMETRY, True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(1, 4, 2, 2).long()}, ValueError, r"ids: expected \[B, T, 3, 2\], got"),
        ({"known": torch.ones(3).bool()}, ValueError, r"known: expected bool \(4,\), one a frame"),
        ({"known": torch.ones(4)}, ValueError, r"known: expected bool .* got torch.float32"),
        ({"actions": None}, ValueError, r"actions: the transformer needs \[1, 4, 2\] .* got None"),
        (
            {"actions": torch.zeros(1, 4, 3)},
            ValueError,
            r"actions: expected \[1, 4, 2\] \(the transformer's 2 numbers a frame\), got \(1, 4, 3\)",
        ),
        ({"actions": torch.zeros(1, 4, 2).long()}, TypeError, "actions: expected a floating-point"),
        ({"actions": torch.full((1, 4, 2), math.nan)}, ValueError, "actions: expected finite"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "ids": torch.zeros(1, 4, 3, 2, dtype=torch.int64),
        "known": torch.arange(4) < 1,
        "settings": MaskViTDecoding(steps=2),
        "actions": torch.zeros(1, 4, 2),
    } | change
    with pytest.raises(error, match=message):
        decode_frames(Tables(action_dim=2), **arguments)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="confidence: expected one of 'log_probability', 'prob"):
        MaskedDecoding(confidence="odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fixed_condition: expected True"):
        MaskViTDecoding(fixed_condition=False)
    with pytest.raises(ValueError, match="guidance: expected 0"):
        MaskViTDecoding(guidance=mf.decoding.Guidance(1.0))
    with pytest.raises(ValueError, match="actions: expected None, the transformer was built with"):
        decode_frames(
            Tables(), torch.zeros(1, 4, 3, 2).long(), torch.arange(4) < 1, MaskViTDecoding(),
            actions=torch.zeros(1, 4, 2),
        )  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("confidence", ["probability", "log_probability"])
def test_cuda_decodes_the_tokens_of_the_cpu(confidence: Any) -> None:
    logits = 2 * torch.randn(2, 4, 16, 16, 64, generator=torch.Generator().manual_seed(0))

    def network(ids: torch.Tensor, unknown: torch.Tensor, **_: Any) -> torch.Tensor:
        shown = torch.where(unknown, 0, ids)
        return logits.to(ids.device) + shown.unsqueeze(-1) / 64

    network.config = Shape(grid=(16, 16), codebook_size=64)  # type: ignore[attr-defined]
    config = MaskViTDecoding(steps=6, confidence=confidence, seed=2)
    ids, known = torch.zeros(2, 4, 16, 16, dtype=torch.int64), torch.arange(4) < 1
    here, there = (
        decode_frames(network, ids.to(device), known, config)  # type: ignore[arg-type]
        for device in ("cpu", "cuda")
    )
    assert (here == there.cpu()).float().mean() > 0.99  # but for near ties
