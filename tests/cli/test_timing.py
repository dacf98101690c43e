"""Medians: warm-up, turns, and a bound on how long a slow machine is kept busy."""

from __future__ import annotations

import pytest
import torch

from magvit_fast import _native
from magvit_fast.cli import timing
from magvit_fast.cli.timing import median_seconds, tokenizer_seconds
from magvit_fast.models import MagvitV2Config, MagvitV2Tokenizer

CPU = torch.device("cpu")


def test_candidates_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = median_seconds(functions, CPU, 2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}
    calls.clear()
    median_seconds(functions, CPU, 2, warm=True)
    assert calls == ["a", "b"] * 2


def test_the_median_is_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5.0, 1.0, 9.0])
    monkeypatch.setattr(timing, "seconds", lambda function, device: next(clock))
    assert median_seconds({"a": list}, CPU, 3, warm=True) == {"a": 5.0}


def test_a_slow_machine_makes_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PATIENCE", -1.0)
    calls: list[int] = []
    median_seconds({"a": lambda: calls.append(1)}, CPU, 100, warm=True)
    assert len(calls) == 1


def test_the_reference_is_timed_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three encodings and decodings run with impl="auto" meaning "reference"."""
    seen: list[tuple[str, str, bool]] = []
    config = MagvitV2Config(
        filters=8, channel_multipliers=(1, 1), temporal_downsample=(True,), num_res_blocks=1, num_bits=4
    )  # fmt: skip
    tokenizer = MagvitV2Tokenizer(config).eval()

    def watch(part: str) -> None:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append((part, _native.current_impl(), inputs[0].is_contiguous()))

        getattr(tokenizer, part).register_forward_pre_hook(hook)

    watch("encoder")
    watch("decoder")
    before = _native.current_impl()
    with torch.inference_mode():
        times = tokenizer_seconds(tokenizer, torch.rand(1, 3, 3, 8, 8), 1)
    for part in ("encoder", "decoder"):
        kinds = {entry[1:] for entry in seen if entry[0] == part}
        assert kinds == {(before, False), ("reference", False), ("reference", True)}
    assert all(value > 0 for value in times.values())
    assert _native.current_impl() == before
