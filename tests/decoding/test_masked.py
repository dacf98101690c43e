from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.goldens import load_goldens

from magvit_fast.decoding.confidence import probability
from magvit_fast.decoding.masked import (
    MaskedDecoding,
    decode_masked,
    likely_values,
    masked_decoding_steps,
)
from magvit_fast.decoding.schedules import Guidance, mask_fraction, unknown_counts
from magvit_fast.nn.embedding import unpack_subtokens

GOLDEN = "magvit_v1/04_decode_N64"
CASES = (
    "A_nocond_cosine",
    "B_fp_cosine",
    "C_notemp_cosine",
    "D_fp_exp400",
    "E_fp_uniform7.5",
    "F_topk5",
    "G_topp0.8",
    "H_sampletemp0.5",
    "I_latentmask_input_input",
    "J_cond_cond",
)


class Tables:
    """The goldens' network: logits from the position, the token there and the token before."""

    def __init__(self, golden: dict[str, np.ndarray], case: str) -> None:
        names = ("position", "token", "previous")
        self.tables = [torch.from_numpy(golden[f"{case}/table_{n}"]) for n in names]
        self.seen: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        position, token, previous = self.tables
        ids = torch.where(mask, token.shape[0] - 1, tokens)
        self.seen.append(torch.where(mask, -1, tokens))
        self.logits.append((position + token[ids] + previous[ids.roll(1, 1)]).unsqueeze(2))
        return self.logits[-1]


class Replay:
    """One stored case: its network and what masked decoding makes of it."""

    def __init__(self, golden: dict[str, np.ndarray], case: str) -> None:
        self.golden, self.case = golden, case
        self.steps, self.shape = int(self.get("K")), self.get("inputs").shape
        self.batch, self.n = self.shape[0], self.get("inputs")[0].numel()
        self.top_k = int(self.get("sampling_topk"))
        self.mode = str(golden[f"{case}/condition_mode"])
        self.fixed = self.mode in ("input->input", "cond->cond")
        conditional = f"{case}/cond_tokens" in golden
        rows = (self.batch, self.n)
        self.condition = torch.zeros(rows).long()
        self.inside = torch.zeros(rows).bool()
        if conditional:
            self.condition = self.get("cond_tokens").long().view(rows)
            self.inside = self.get("cond_mask").view(rows)
        if self.mode == "input->input":
            self.condition = self.get("inputs").long().view(rows)
        self.network = Tables(golden, case)

    def get(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.golden[f"{self.case}/{name}"]))

    def settings(self, *, named: bool = False) -> MaskedDecoding:
        """With the release's float32 counts, or by the name of the schedule."""
        counts = tuple(self.get("num_unknown")[1:, 0].tolist())
        return MaskedDecoding(
            steps=self.steps,
            schedule=str(self.golden[f"{self.case}/schedule"]) if named else counts,
            temperature=float(self.get("sampling_temperature")),
            choice_temperature=float(self.get("mask_temperature")),
            top_k=self.top_k,
            top_p=float(self.get("sampling_topp")),
            fixed_condition=self.fixed,
        )

    def noise(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        values, choice = self.get("gumbel_sample"), self.get("gumbel_mask")
        if self.top_k:
            # stored for the logits in falling order: put every number where its logit is
            order = self.get("logits").sort(dim=-1, descending=True, stable=True).indices
            zeros = torch.zeros_like(self.get("logits"))
            values = zeros.scatter(-1, order[..., : self.top_k], values)
        return [
            (values[k].view(self.batch, self.n, 1, -1), choice[k].view(self.batch, self.n))
            for k in range(self.steps)
        ]

    def check_step(self, k: int, unknown: torch.Tensor, tokens: torch.Tensor) -> None:
        """Everything that the release computes within step k, from what it knew before it."""
        steps, shape, progress = self.steps, self.shape, (k + 1) / self.steps
        assert torch.equal(self.network.seen[k].view(shape), self.get("tokens_in")[k].long()), k
        shown = unknown & self.inside & (not self.fixed)
        assert torch.equal(shown.view(shape), self.get("segment_in")[k].bool()), k
        logits = self.get("logits")[k]
        ours = self.network.logits[k].view(*shape, -1)
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=0)
        assert logits.shape[-1] == int(self.get("vocab"))
        assert torch.equal(tokens.view(shape), self.get("tokens_full")[k].long()), k
        confidence = self.get("confidence")[k].view(self.batch, self.n)
        p = probability(self.network.logits[k], tokens)
        torch.testing.assert_close(p[unknown], confidence[unknown], atol=1e-6, rtol=1e-5)
        assert confidence[~unknown].isinf().all()
        noise = float(self.get("mask_temperature")) * (1 - progress) * self.noise()[k][1]
        score = self.get("mask_score")[k].view(self.batch, self.n)
        expected = (p.log() + noise)[unknown]
        torch.testing.assert_close(score[unknown], expected, atol=2e-4, rtol=1e-5)
        limit = unknown.sum(1) - 1
        assert torch.equal(limit, self.get("limit_max")[k].long())
        total = int(self.get("num_unknown")[0, 0])
        share = mask_fraction(str(self.golden[f"{self.case}/schedule"]), progress, total)
        assert share == pytest.approx(float(self.get("ratio")[k]), abs=2e-6)
        if k < steps - 1:
            wanted = [
                max(1, min(math.floor(float(self.get("ratio")[k]) * total), int(most)))
                for most in limit
            ]
            official = self.get("num_unknown")[k + 1].tolist()
            assert all(0 <= a - b <= 1 for a, b in zip(wanted, official, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_replays_the_official_decoding(case: str) -> None:
    replay = Replay(load_goldens(GOLDEN), case)
    get, shape, steps = replay.get, replay.shape, replay.steps
    assert get("latent_shape").tolist() == list(shape[1:])
    for name in ("min_gap_sampling", "min_gap_masking"):  # no decision hangs on rounding
        margin = float(get(name))
        assert margin >= 6e-5 or np.isinf(margin)
    unconditional = Tables(replay.golden, case)
    unknown = ~replay.inside if replay.fixed else torch.ones_like(replay.inside)
    states = masked_decoding_steps(
        replay.network, replay.condition, replay.inside, replay.settings(), noise=replay.noise()
    )
    for state in states:
        k = state.step
        replay.check_step(k, unknown, state.tokens)
        if k < steps - 1:  # the last step leaves nothing unknown here, one (unused) there
            assert torch.equal(state.unknown.view(shape), get("unknown")[k + 1]), k
            unconditional(state.tokens, state.unknown)
            assert torch.equal(unconditional.seen[-1].view(shape), get("uncond_next")[k].long()), k
        if k > 0:
            assert torch.equal(replay.network.seen[k].view(shape), get("tokens_next")[k - 1].long())
        unknown = state.unknown
    assert k == steps - 1
    assert not state.unknown.any()
    assert torch.equal(state.tokens.view(shape), get("final").long())
    total = int(get("num_unknown")[0, 0])
    named = replay.settings(named=True).counts(total)
    official = get("num_unknown")[1:-1, 0].tolist()
    assert all(0 <= a - b <= 1 for a, b in zip(named[:-1], official, strict=True))


def random_network(num_values: int = 8, subtokens: int = 2, seed: int = 0) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(num_values**subtokens + 1, subtokens, num_values, generator=generator) * 2

    def predict(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ids = torch.where(mask, table.shape[0] - 1, tokens)
        return table[ids] + 0.5 * table[ids.roll(1, 1)]

    return predict


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    steps=st.integers(1, 14),
    schedule=st.sampled_from(["cosine", "uniform", "exp", "log", "pow0.5", "pow2", "poly:-1,0,1"]),
    seed=st.integers(0, 2**31),
)
def test_invariants(num_tokens: int, steps: int, schedule: str, seed: int) -> None:
    counts = [*unknown_counts(schedule, num_tokens, steps)[:-1], 0]
    condition = torch.randint(0, 64, (2, num_tokens))
    inside = torch.arange(num_tokens) < num_tokens // 3
    config = MaskedDecoding(steps=steps, schedule=schedule, seed=seed)
    tokens, unknown = condition, torch.ones(2, num_tokens, dtype=torch.bool)
    for state in masked_decoding_steps(random_network(), condition, inside, config):
        assert torch.equal(state.tokens[~unknown], tokens[~unknown])  # known tokens never change
        assert not (state.unknown & ~unknown).any()
        assert state.unknown.sum(1).tolist() == [counts[state.step]] * 2  # exactly n unknown
        tokens, unknown = state.tokens, state.unknown
    assert not unknown.any()
    assert ((tokens >= 0) & (tokens < 64)).all()


def test_same_seed_same_tokens_and_windows_differ() -> None:
    condition, inside = torch.zeros(3, 50, dtype=torch.int64), torch.zeros(50, dtype=torch.bool)

    def run(seed: int, first_step: int = 0) -> torch.Tensor:
        config = MaskedDecoding(steps=5, seed=seed)
        return decode_masked(random_network(), condition, inside, config, first_step=first_step)

    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))
    assert not torch.equal(run(7), run(7, first_step=5))
    assert not torch.equal(run(7)[0], run(7)[1])  # the samples of a batch are drawn apart


def test_injected_noise_replaces_the_seed() -> None:
    condition, inside = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(30, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def gumbel(*shape: int) -> torch.Tensor:
        return -torch.log(-torch.log(torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)))

    noise = [(gumbel(2, 30, 2, 8), gumbel(2, 30)) for _ in range(4)]

    def run(seed: int, noise_: list[tuple[torch.Tensor, torch.Tensor]] | None) -> torch.Tensor:
        config = MaskedDecoding(steps=4, seed=seed)
        return decode_masked(random_network(), condition, inside, config, noise=noise_)

    assert torch.equal(run(1, noise), run(2, noise))
    assert not torch.equal(run(1, noise), run(1, None))


def test_condition_tokens_are_shown_while_unknown_and_may_be_refined() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    network = random_network()

    def predict(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append((tokens, mask))
        return network(tokens, mask)

    condition, inside = torch.full((1, 20), 63), torch.arange(20) < 8
    states = list(masked_decoding_steps(predict, condition, inside, MaskedDecoding(steps=6)))
    first_tokens, first_mask = seen[0]
    assert torch.equal(first_mask[0], ~inside)
    assert (first_tokens[0, inside] == 63).all()
    for (tokens, mask), before in zip(seen[1:], states[:-1], strict=True):
        assert torch.equal(mask, before.unknown & ~inside)
        again = before.unknown & inside
        assert (tokens[again] == 63).all()
        assert torch.equal(tokens[~before.unknown], before.tokens[~before.unknown])
    assert (states[-1].tokens[0, inside] != 63).any()


def test_guidance_moves_the_distribution() -> None:
    condition, inside = torch.zeros(1, 200, dtype=torch.int64), torch.zeros(200, dtype=torch.bool)
    bias = torch.zeros(4)
    bias[2] = 0.5

    def conditional(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return bias.expand(1, 200, 1, 4)

    def unconditional(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 200, 1, 4)

    def share(guidance: Guidance) -> float:
        config = MaskedDecoding(steps=4, guidance=guidance)
        tokens = decode_masked(
            conditional, condition, inside, config, predict_unconditional=unconditional
        )
        return (tokens == 2).float().mean().item()

    # softmax of 0.5 * (1 + s): about 0.35 at s = 0 and 0.99 at s = 11
    assert share(Guidance(0.0)) < 0.55
    assert share(Guidance(11.0)) > 0.95
    assert share(Guidance(0.0)) < share(Guidance(11.0, "cosine_power")) <= 1.0


def test_guidance_is_not_rounded_to_bfloat16() -> None:
    shape, generator = (2, 1, 400, 1, 16), torch.Generator().manual_seed(0)
    pair = (8 * torch.randn(shape, generator=generator)).bfloat16()
    condition, inside = torch.zeros(1, 400, dtype=torch.int64), torch.zeros(400, dtype=torch.bool)
    tokens = decode_masked(
        lambda *_: pair[0], condition, inside,
        MaskedDecoding(steps=1, temperature=0.0, guidance=Guidance(3.0)),
        predict_unconditional=lambda *_: pair[1],
    )  # fmt: skip
    exact = pair[0].double() + 3.0 * (pair[0].double() - pair[1].double())
    assert torch.equal(tokens, exact.argmax(-1)[..., 0])


def test_guidance_of_zero_saves_the_second_pass() -> None:
    def fail(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    condition, inside = torch.zeros(1, 10, dtype=torch.int64), torch.zeros(10, dtype=torch.bool)
    network = random_network()
    decode_masked(network, condition, inside, MaskedDecoding(steps=2), predict_unconditional=fail)


def test_more_steps_than_tokens_end_all_the_same() -> None:
    """Where one token is left the release makes all of them unknown again; here they stay known."""
    golden = load_goldens("magvit_v1/04_decode_degenerate")
    official = golden["tiny_cosine/num_unknown"][:, 0].tolist()
    assert official == [8, 7, 6, 5, 4, 3, 2, 1, 8, 3, 2, 1, 8]
    # up to the step after which one is left both agree in everything
    replay = Replay(golden, "tiny_cosine")
    unknown = torch.ones_like(replay.inside)
    for state in masked_decoding_steps(
        replay.network, replay.condition, replay.inside, replay.settings(named=True),
        noise=replay.noise(),
    ):  # fmt: skip
        if state.step == 7:
            assert not state.unknown.any()  # here the last token becomes known, and that is all
            break
        replay.check_step(state.step, unknown, state.tokens)
        after = replay.get("unknown")[state.step + 1].view_as(unknown)
        assert torch.equal(state.unknown, after)
        unknown = state.unknown
    condition, inside = torch.zeros(2, 8).long(), torch.zeros(8, dtype=torch.bool)
    states = list(
        masked_decoding_steps(random_network(), condition, inside, MaskedDecoding(steps=12))
    )
    counts = [8] + [int(state.unknown.sum(1)[0]) for state in states]
    assert counts[:8] == official[:8]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_likely_values_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()
    assert likely_values(logits, top_k=2).tolist() == [[True, False, True, False]]
    assert likely_values(logits, top_k=9).all()
    assert likely_values(logits, top_p=0.4).tolist() == [[True, False, False, False]]
    assert likely_values(logits, top_p=0.7).tolist() == [[True, False, True, False]]
    assert likely_values(logits, top_p=0.8).tolist() == [[True, False, True, True]]
    assert likely_values(logits, top_p=1.0).tolist() == [[True, True, True, True]]


@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.5}])
def test_seeded_draws_stay_within_the_cut(cut: dict[str, float]) -> None:
    logits = torch.randn(1, 300, 2, 8, generator=torch.Generator().manual_seed(1))

    def predict(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return logits

    def run(**options: float) -> torch.Tensor:
        condition, inside = torch.zeros(1, 300).long(), torch.zeros(300, dtype=torch.bool)
        settings = MaskedDecoding(steps=3, seed=5, **options)  # type: ignore[arg-type]
        return unpack_subtokens(decode_masked(predict, condition, inside, settings), 2, 8)

    allowed = likely_values(logits, **cut)  # type: ignore[arg-type]
    assert allowed.gather(-1, run(**cut).unsqueeze(-1)).all()
    assert torch.equal(run(**cut), run(**cut))
    assert not allowed.gather(-1, run().unsqueeze(-1)).all()
    assert (run(**cut) != logits.argmax(-1)).any()
    everything = {"top_k": 8} if "top_k" in cut else {"top_p": 1.0}
    assert torch.equal(run(**everything), run())  # the same random numbers as without a cut
    assert torch.equal(run(**cut, temperature=0.0), logits.argmax(-1))


def test_fixed_conditions_stay_and_may_differ_between_samples() -> None:
    condition = torch.full((3, 20), 63)
    inside = torch.arange(20) < torch.tensor([[5], [12], [20]])
    config = MaskedDecoding(steps=4, fixed_condition=True)
    states = list(masked_decoding_steps(random_network(), condition, inside, config))
    for state in states:
        assert (state.tokens[inside] == 63).all()
        assert not (state.unknown & inside).any()
        expected = [config.counts(n)[state.step] if n else 0 for n in (15, 8, 0)]
        assert state.unknown.sum(1).tolist() == expected
    assert not states[-1].unknown.any()
    assert (states[-1].tokens[~inside] != 63).any()


def test_bad_input() -> None:
    network = random_network()
    z, inside = torch.zeros(1, 10, dtype=torch.int64), torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"condition: expected \[B, N\]"):
        decode_masked(network, z[0], inside, MaskedDecoding())
    with pytest.raises(TypeError, match="condition: expected int64"):
        decode_masked(network, z.int(), inside, MaskedDecoding())
    with pytest.raises(TypeError, match="condition_mask: expected bool"):
        decode_masked(network, z, inside.int(), MaskedDecoding())
    with pytest.raises(ValueError, match="condition_mask: expected"):
        decode_masked(network, z, inside[:4], MaskedDecoding())
    with pytest.raises(ValueError, match="predict_unconditional"):
        decode_masked(network, z, inside, MaskedDecoding(guidance=Guidance(1.0)))
    with pytest.raises(ValueError, match="noise: expected 12 pairs"):
        decode_masked(network, z, inside, MaskedDecoding(), noise=[])
    for change, message in (
        ({"steps": 0}, "steps"),
        ({"schedule": "x"}, "schedule"),
        ({"schedule": (5, 7), "steps": 2}, "schedule: expected 2 falling numbers"),
        ({"temperature": -1.0}, "temperature"),
        ({"choice_temperature": float("nan")}, "choice_temperature"),
        ({"top_k": -1}, "top_k: expected 0 or more"),
        ({"top_p": 1.5}, "top_p: expected a value"),
        ({"top_k": 2, "top_p": 0.5}, "top_k and top_p"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedDecoding(**change)  # type: ignore[arg-type]
