from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.goldens import load_goldens

from magvit_fast.decoding.masked import (
    MaskedDecoding,
    decode_masked,
    likely_values,
    masked_decoding_steps,
)
from magvit_fast.decoding.schedules import Guidance, unknown_counts
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

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        position, token, previous = self.tables
        ids = torch.where(mask, token.shape[0] - 1, tokens)
        self.seen.append(torch.where(mask, -1, tokens))
        return (position + token[ids] + previous[ids.roll(1, 1)]).unsqueeze(2)


@pytest.mark.parametrize("case", CASES)
def test_replays_the_official_decoding(case: str) -> None:
    golden = load_goldens(GOLDEN)

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(golden[f"{case}/{name}"]))

    steps, shape = int(get("K")), get("inputs").shape
    batch, n = shape[0], get("inputs")[0].numel()
    has_condition = f"{case}/cond_tokens" in golden
    condition = (
        get("cond_tokens").long().view(batch, n) if has_condition else torch.zeros(batch, n).long()
    )
    inside = get("cond_mask").view(batch, n) if has_condition else torch.zeros(batch, n).bool()
    fixed = str(golden[f"{case}/condition_mode"]) in ("input->input", "cond->cond")
    if str(golden[f"{case}/condition_mode"]) == "input->input":
        condition = get("inputs").long().view(batch, n)
    values, choice = get("gumbel_sample"), get("gumbel_mask")
    top_k = int(get("sampling_topk"))
    if top_k:  # stored for the logits in falling order: put every number where its logit is
        order = get("logits").sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        values = torch.zeros_like(get("logits")).scatter(-1, order, values)
    network, unconditional = Tables(golden, case), Tables(golden, case)
    states = masked_decoding_steps(
        network,
        condition,
        inside,
        MaskedDecoding(
            steps=steps,
            schedule=tuple(get("num_unknown")[1:, 0].tolist()),  # float32 counts of the release
            temperature=float(get("sampling_temperature")),
            choice_temperature=float(get("mask_temperature")),
            top_k=top_k,
            top_p=float(get("sampling_topp")),
            fixed_condition=fixed,
        ),
        noise=[(values[k].view(batch, n, 1, -1), choice[k].view(batch, n)) for k in range(steps)],
    )
    for state in states:
        k = state.step
        assert torch.equal(network.seen[k].view(shape), get("tokens_in")[k].long()), k
        assert torch.equal(state.tokens.view(shape), get("tokens_full")[k].long()), k
        if k < steps - 1:  # the last step leaves nothing unknown here, one (unused) there
            assert torch.equal(state.unknown.view(shape), get("unknown")[k + 1]), k
            unconditional(state.tokens, state.unknown)
            assert torch.equal(unconditional.seen[-1].view(shape), get("uncond_next")[k].long()), k
    assert k == steps - 1
    assert not state.unknown.any()
    assert torch.equal(state.tokens.view(shape), get("final").long())
    total = int(get("num_unknown")[0, 0])
    named = MaskedDecoding(steps=steps, schedule=str(golden[f"{case}/schedule"])).counts(total)
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
    schedule=st.sampled_from(["cosine", "uniform", "exp", "log", "pow2"]),
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
