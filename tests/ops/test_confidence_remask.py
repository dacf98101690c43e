"""confidence_remask: the same tokens from kernel and reference, the distribution, exact counts."""

from __future__ import annotations

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from benchmarks.problem_files import problems
from hypothesis import given
from torch import Tensor

import magvit_fast as mf
from magvit_fast.testing.budgets import assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "choice_temperature": 2.0},
    {"temperature": 0.0, "choice_temperature": 1.0},
    {"temperature": 3.0, "choice_temperature": 4.5, "seed": 2**62 + 12345, "step": 2**32 - 1},
]
module = importlib.import_module("magvit_fast.ops.confidence_remask")


def _inputs(problem: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, length, groups, values = problem["logits"]
    logits = (2 * torch.randn(batch, length, groups, values)).to(dtype)
    tokens = torch.randint(0, values**groups, (batch, length))
    return logits, tokens, torch.rand(batch, length) < problem["unknown"]


@pytest.mark.parametrize("problem", problems("confidence_remask", "test"), ids=lambda p: p["name"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(
    problem: dict[str, Any], dtype: torch.dtype, isa_level: str
) -> None:
    inputs = _inputs(problem, dtype)
    noise = (torch.randn(problem["logits"]), torch.randn(problem["logits"][:2]))
    for options in [*SETTINGS, {"noise": noise, "choice_temperature": 0.5}]:
        native = mf.confidence_remask(*inputs, num_unknown=4, impl="native", **options)
        plain = mf.confidence_remask(*inputs, num_unknown=4, impl="reference", **options)
        # Bit-equal: of a few hundred draws none ties within rounding.
        assert_equal(native[0], plain[0], name=f"tokens, {options.keys()}")
        assert_equal(native[1], plain[1], name=f"unknown, {options.keys()}")


def test_rows_longer_than_a_block_and_forbidden_values(isa_level: str) -> None:
    logits = torch.randn(1, 3, 1, 2048)
    logits[..., ::3] = -torch.inf
    inputs = (logits, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    for seed in range(5):
        for temperature in (1.0, 0.2, 0.0):
            options = {"num_unknown": 1, "seed": seed, "temperature": temperature}
            native = mf.confidence_remask(*inputs, impl="native", **options)
            plain = mf.confidence_remask(*inputs, impl="reference", **options)
            assert_equal(native[0], plain[0])
            assert_equal(native[1], plain[1])
            assert bool((native[0] % 3 != 0).all())


def test_philox_known_answers() -> None:
    """The vectors of the Random123 distribution for philox4x32-10, as far as our counters reach."""
    zero = [int(module.philox_words(torch.tensor([i]), 0, 0, 0)) for i in range(4)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    high, low = module._multiply(torch.tensor([0xFFFFFFFF]), 0xD2511F53)
    product = 0xFFFFFFFF * 0xD2511F53
    assert (int(high), int(low)) == (product >> 32, product & 0xFFFFFFFF)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_samples_follow_the_softmax(impl: str) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5, -3.0, 1.5])
    count = 20000
    tokens, unknown = torch.zeros(1, count, dtype=torch.int64), torch.ones(1, count).bool()
    for temperature in (1.0, 2.0):
        picked, _ = mf.confidence_remask(
            logits.expand(1, count, 1, 8), tokens, unknown, num_unknown=0,
            temperature=temperature, seed=7, impl=impl,
        )  # fmt: skip
        frequency = (
            picked.bincount(minlength=8) if picked.dim() == 1 else picked[0].bincount(minlength=8)
        )
        expected = count * (logits / temperature).softmax(0)
        deviation = (frequency - expected) / expected.clamp(min=1e-9).sqrt()
        assert frequency[4] == 0
        assert bool((deviation[expected > 0].abs() < 4.5).all()), deviation


@pytest.mark.parametrize("values", [64, 2**17])  # one block; more blocks than are remembered
def test_rare_and_forbidden_values(values: int, isa_level: str) -> None:
    """Where u falls by hand: kernel and reference find the same value, never one without a weight."""
    logits = torch.full((1, 40, 1, values), -torch.inf)
    logits[..., values // 2] = 0.0
    logits[..., 5] = -18.0  # 1.5e-8: below the rounding of a float32 sum
    logits[..., values - 2] = -18.0
    tokens, unknown = torch.zeros(1, 40, dtype=torch.int64), torch.ones(1, 40).bool()
    seen = set()
    for seed in range(3):
        for temperature in (1.0, 9.0):
            both = [
                mf.confidence_remask(
                    logits,
                    tokens,
                    unknown,
                    num_unknown=0,
                    seed=seed,
                    temperature=temperature,
                    impl=impl,
                )[0]
                for impl in ("native", "reference")
            ]
            assert_equal(both[0], both[1])
            seen |= set(both[0].flatten().tolist())
    assert seen == {5, values // 2, values - 2}  # at temperature 9 each has a share


def test_uniform_numbers() -> None:
    u = module.uniform(torch.arange(20000), 3, 0, 11)
    assert 0 < float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert u.unique().numel() == 20000
    words = [int(module.philox_words(torch.tensor([i]), 3, 0, 11)) for i in (8, 9)]
    assert float(u[4]) == (((words[0] << 20) | (words[1] >> 12)) + 0.5) / 2**52


@given(
    batch=st.integers(0, 3), length=st.integers(0, 30), share=st.floats(0, 1), seed=st.integers(0, 99),
    choice=st.sampled_from([0.0, 4.5]), ties=st.booleans(), count=st.integers(0, 35),
)  # fmt: skip
def test_counts_are_exact(
    batch: int, length: int, share: float, seed: int, choice: float, ties: bool, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, 2, 4, generator=generator)
    if ties:
        logits = torch.zeros_like(logits)
    tokens = torch.randint(0, 16, (batch, length), generator=generator)
    unknown = torch.rand(batch, length, generator=generator) < share
    for impl in ("native", "reference"):
        new, still = mf.confidence_remask(
            logits,
            tokens,
            unknown,
            num_unknown=count,
            choice_temperature=choice,
            seed=seed,
            impl=impl,
        )
        assert_equal(still.sum(1), unknown.sum(1).clamp(max=count))
        assert not bool((still & ~unknown).any())
        assert_equal(new[~unknown], tokens[~unknown])
        assert bool(((new >= 0) & (new < 16)).all())
        if ties and choice == 0:  # all equally confident: the lowest positions stay unknown
            assert_equal(still, unknown & (unknown.cumsum(1) <= count))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_least_confident_stay_unknown(impl: str) -> None:
    confidence = torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0]])
    logits = torch.zeros(1, 5, 1, 2)
    logits[..., 1] = confidence.unsqueeze(-1)  # the surer, the larger the gap
    tokens, unknown = (
        torch.zeros(1, 5, dtype=torch.int64),
        torch.tensor([[True, True, True, True, False]]),
    )
    new, still = mf.confidence_remask(
        logits, tokens, unknown, num_unknown=torch.tensor([2]), temperature=0.0, impl=impl
    )
    assert new.tolist() == [[1, 1, 1, 1, 0]]
    assert still.tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_counts_per_clip_strides_and_scalars(impl: str) -> None:
    logits = torch.randn(8, 2, 5, 3).permute(3, 2, 1, 0)  # [3, 5, 2, 8]
    tokens, unknown = torch.randint(0, 64, (5, 3)).T, torch.ones(5, 3).bool().T
    _, still = mf.confidence_remask(
        logits, tokens, unknown, num_unknown=torch.tensor([0, 2, 9]), impl=impl
    )
    assert still.sum(1).tolist() == [0, 2, 5]
    copies = [x.contiguous() for x in (logits, tokens, unknown)]
    for count in (2, torch.tensor(2), torch.tensor([2], dtype=torch.int32)):
        a = mf.confidence_remask(logits, tokens, unknown, num_unknown=count, impl=impl)
        b = mf.confidence_remask(*copies, num_unknown=2, impl=impl)
        assert_equal(a[0], b[0])
        assert_equal(a[1], b[1])


def test_draws_depend_on_the_key_only() -> None:
    inputs = _inputs({"logits": [1, 40, 2, 64], "unknown": 1.0})
    options: dict[str, Any] = {"num_unknown": 10, "choice_temperature": 1.0, "impl": "native"}
    first = mf.confidence_remask(*inputs, seed=1, step=2, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = mf.confidence_remask(*inputs, seed=1, step=2, **options)
    finally:
        torch.set_num_threads(before)
    assert_equal(again[0], first[0])
    assert_equal(again[1], first[1])
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1 + 2**32, "step": 2}):
        assert not torch.equal(mf.confidence_remask(*inputs, **other, **options)[0], first[0])


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_logits_are_named(impl: str, temperature: float, value: float, isa_level: str) -> None:
    logits = torch.zeros(2, 9, 2, 64)
    tokens, unknown = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9).bool()
    logits[1, 3, 1] = value
    logits[1, 7, 0, 63] = torch.nan
    logits[0, 2, 0, 5] = torch.nan
    unknown[0, 2] = False  # the logits of a known position do not matter
    with pytest.raises(ValueError, match=r"logits: .* unknown position \(1, 3\)"):
        mf.confidence_remask(
            logits, tokens, unknown, num_unknown=1, temperature=temperature, impl=impl
        )
    unknown[1] = False
    mf.confidence_remask(logits, tokens, unknown, num_unknown=1, impl=impl)


def test_opcheck() -> None:
    op = torch.ops.magvit_fast.confidence_remask.default
    logits, tokens, unknown = _inputs({"logits": [2, 5, 2, 8], "unknown": 0.5})
    count = torch.tensor([2, 2])
    noise = (torch.randn(2, 5, 2, 8), torch.randn(2, 5))
    torch.library.opcheck(op, (logits, tokens, unknown, count, None, None, 1.0, 1.0, 3, 4))
    torch.library.opcheck(op, (logits, tokens, unknown, count, *noise, 1.0, 1.0, 3, 4))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compiles_whole_without_recompiling(impl: str) -> None:
    logits, tokens, unknown = _inputs({"logits": [2, 9, 2, 8], "unknown": 0.7})

    def f(logits: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return mf.confidence_remask(
            logits * 2, tokens, unknown, num_unknown=count, choice_temperature=1.0, impl=impl
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for count in (torch.tensor([1, 2]), torch.tensor([3, 0])):
        for a, e in zip(compiled(logits, count), f(logits, count), strict=True):
            assert_equal(a, e)


def test_modes_and_float64() -> None:
    logits, tokens, unknown = _inputs({"logits": [2, 9, 2, 8], "unknown": 0.7})
    expected = mf.confidence_remask(logits, tokens, unknown, num_unknown=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        actual = mf.confidence_remask(logits, tokens, unknown, num_unknown=2)
    assert_equal(actual[0], expected[0])
    wide = mf.confidence_remask(logits.double().requires_grad_(), tokens, unknown, num_unknown=2)
    assert_equal(wide[0], expected[0])
    with pytest.raises(NotImplementedError, match="float64"):
        mf.confidence_remask(logits.double(), tokens, unknown, num_unknown=2, impl="native")


def test_bad_input() -> None:
    logits, tokens, unknown = _inputs({"logits": [2, 5, 2, 8], "unknown": 0.5})

    def call(*inputs: Any, **options: Any) -> None:
        mf.confidence_remask(*inputs, **{"num_unknown": 1, **options})

    with pytest.raises(ValueError, match=r"logits: expected 4 dimensions"):
        call(logits[0], tokens, unknown)
    with pytest.raises(ValueError, match=r"logits: expected a power of two of values"):
        call(logits[..., :7], tokens, unknown)
    with pytest.raises(TypeError, match=r"tokens: expected dtype torch.int64, got torch.int32"):
        call(logits, tokens.int(), unknown)
    with pytest.raises(TypeError, match=r"unknown: expected dtype torch.bool, got torch.int64"):
        call(logits, tokens, tokens)
    with pytest.raises(ValueError, match=r"unknown: expected shape \(2, 5\).*got \(5, 2\)"):
        call(logits, tokens, unknown.T)
    for options, message in [
        ({"num_unknown": -1}, r"num_unknown: expected 0 or more, got -1"),
        ({"num_unknown": torch.tensor([1, -2])}, r"num_unknown: expected 0 or more, got -2"),
        ({"num_unknown": torch.tensor([1, 2, 3])}, r"num_unknown: expected shape"),
        ({"temperature": -0.5}, r"temperature: expected a finite number, 0 or more, got -0.5"),
        ({"choice_temperature": torch.inf}, r"choice_temperature: expected a finite number"),
        ({"seed": -1}, r"seed: expected 0 <= seed < 2\*\*63, got -1"),
        ({"step": 2**32}, r"step: expected 0 <= step < 2\*\*32"),
        ({"noise": (logits, logits)}, r"noise\[1\]: expected shape \(2, 5\)"),
        ({"noise": (torch.full_like(logits, torch.nan), logits[..., 0, 0])}, r"no NaN in noise"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(logits, tokens, torch.ones_like(unknown), **options)
    with pytest.raises(TypeError, match=r"num_unknown: expected an int or an int tensor"):
        call(logits, tokens, unknown, num_unknown=torch.tensor([1.0, 2.0]))
