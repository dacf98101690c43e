"""`bench`: a tokenizer of ours, and any model of others before and after patching."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from magvit_fast.cli import bench, bench_model


def test_bench(cli: Callable, models: Any) -> None:
    words = ("bench", "--tokenizer", models.tokenizer, "--frames", "5", "--size", "16")
    result = cli(*words, "--repeats", "1", "--json")
    facts = json.loads(result.out)
    assert facts["shape"] == [1, 3, 5, 16, 16]
    for part in ("encode", "decode"):
        ours, reference = facts[f"{part}_seconds"], facts[f"reference_{part}_seconds"]
        assert facts[f"{part}_speedup"] == pytest.approx(reference / ours)
    assert "frames/s" in cli(*words, "--repeats", "1", "--dtype", "bfloat16").out


def test_bench_of_a_first_generation_tokenizer(cli: Callable, first_generation: list[str]) -> None:
    words = ("bench", *first_generation[:2], "--size", "16", "--repeats", "1", "--json")
    result = cli(*words)
    assert result.status == 0, result.err
    assert json.loads(result.out)["shape"] == [1, 3, 16, 16, 16]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(total, how far it went) of each progress bar."""
    bars: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def progress(name: str, total: int, unit: str, *, still: bool) -> Iterator[Callable]:
        assert still  # nothing draws while something is timed
        bars.append((total, 0))
        yield lambda count: bars.append((total, bars.pop()[1] + count))

    for module in (bench, bench_model):
        monkeypatch.setattr(module, "progress", progress)
    return bars


def test_progress_is_shown(cli: Callable, models: Any, rounds: list[tuple[int, int]]) -> None:
    words = ("--frames", "5", "--size", "16", "--repeats", "2")
    assert cli("bench", "--tokenizer", models.tokenizer, *words).status == 0
    assert cli("bench", "--model", f"{__name__}:Codec", *words).status == 0
    assert rounds == [(3, 3), (4, 4)]


def test_bench_bad_input(fails: Callable, models: Any) -> None:
    assert "no preset 'fast'" in fails("bench", "--preset", "fast")
    both = ("--preset", "magvit-v2-demo", "--tokenizer", models.tokenizer)
    assert "got both" in fails("bench", *both)


class Codec(torch.nn.Module):
    """A model with encode and decode, as third parties have them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = torch.nn.Conv3d(3, width, 3, stride=2, padding=1)
        self.up = torch.nn.ConvTranspose3d(width, 3, 2, stride=2)

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.down(video),)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.up(latent)


def test_bench_of_a_third_party_model(cli: Callable) -> None:
    words = ("bench", "--model", f"{__name__}:Codec", "--frames", "4", "--size", "16")
    sized = (*words, "--repeats", "1", "--config", '{"width": 4}')
    facts = json.loads(cli(*sized, "--json").out)
    assert facts["swapped"] == 1
    assert "transposed" in facts["left"][0]
    assert facts["encode_difference"] < 1e-5
    assert facts["decode_difference"] == 0
    assert facts["encode_seconds"] > 0
    assert facts["patched_decode_peak_bytes"] is None or facts["patched_decode_peak_bytes"] >= 0
    assert facts["unpatched_format"] == "contiguous"
    text = cli(*words, "--repeats", "1").out
    assert "left alone: up (ConvTranspose3d)" in text


def test_channels_last_is_held_against_the_faster_format(monkeypatch: pytest.MonkeyPatch) -> None:
    formats, model = [], Codec().eval()
    video = torch.rand(1, 3, 4, 16, 16)
    seconds = {"": (4.0, 1.0), "channels_last ": (1.0, 2.0), "patched ": (0.5, 0.5)}
    encode = Codec.encode

    def seen(self: Codec, video: torch.Tensor) -> tuple[torch.Tensor]:
        (latent,) = encode(self, video)
        formats.append(video.is_contiguous(memory_format=torch.channels_last_3d))
        return (latent,)

    def clock(candidates: Any, *_: Any, **__: Any) -> dict[str, float]:
        assert set(candidates) == {p + n for p in seconds for n in ("encode", "decode")}
        return {
            p + n: t
            for p, ts in seconds.items()
            for n, t in zip(("encode", "decode"), ts, strict=True)
        }

    monkeypatch.setattr(Codec, "encode", seen)
    monkeypatch.setattr(bench_model, "median_seconds", clock)
    facts = bench_model.compare(model, video, 1, channels_last=True)
    # for the latent; as it is, patched, and in the other format
    assert formats[:4] == [False, False, False, True]
    assert facts["unpatched_format"] == "channels_last"
    assert (facts["encode_seconds"], facts["decode_seconds"]) == (1.0, 2.0)
    assert facts["speedup"] == 3.0
    assert facts["encode_difference"] < 1e-5
    assert model.down.weight.is_contiguous()


def test_bench_of_a_model_without_encode(cli: Callable) -> None:
    words = ("bench", "--model", "torch.nn:Conv3d", "--frames", "2", "--size", "8", "--json")
    arguments = '{"in_channels": 3, "out_channels": 4, "kernel_size": 1}'
    facts = json.loads(cli(*words, "--config", arguments).out)
    assert facts["parts"] == ["forward"]


def test_bench_of_a_model_bad_input(fails: Callable) -> None:
    assert "MODULE:CLASS" in fails("bench", "--model", "torch.nn")
    assert "MODULE:CLASS" in fails("bench", "--model", "torch.nn:Nothing")
    assert "'no_such_package'" in fails("bench", "--model", "no_such_package:Model")
    assert "does not take" in fails("bench", "--model", "torch.nn:Conv3d", "--config", "[]")
    assert "torch.nn.Module" in fails("bench", "--model", "builtins:dict")
    assert "--config" in fails("bench", "--config", "{}")
    both = ("--model", "torch.nn:Conv3d", "--preset", "magvit-v2-demo")
    assert "--preset" in fails("bench", *both)
