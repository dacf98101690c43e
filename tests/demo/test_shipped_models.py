"""The models that come along: small enough, complete, and as good as they are said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import magvit_fast as mf
from magvit_fast.data.synthetic import HELD_OUT_SEEDS, demo_clip, render_clip
from magvit_fast.data.video import read_video, write_video
from magvit_fast.metrics import psnr
from magvit_fast.models import MagvitV2Tokenizer, MaskedTransformer

FOLDER = Path(mf.__file__).parent / "demo"
GIVEN = 5
Models = tuple[MagvitV2Tokenizer, MaskedTransformer]


@pytest.fixture(scope="module")
def models() -> Models:
    return (
        MagvitV2Tokenizer.from_pretrained(FOLDER / "tokenizer"),
        MaskedTransformer.from_pretrained(FOLDER / "transformer"),
    )


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))


def _through_h264(seed: int | None, folder: Path) -> Tensor:
    """A scene, written as H.264 and read back: [1, 3, 17, 64, 64]. None: the demo's."""
    frames = demo_clip(17) if seed is None else render_clip(seed)
    path = folder / "clip.mp4"
    write_video(path, torch.from_numpy(frames).permute(3, 0, 1, 2), 8.0, crf=12.0)
    return read_video(path, frames=17).unsqueeze(0)


def _scores(models: Models, video: Tensor, decoding: dict) -> tuple[float, float]:
    """PSNR of the reconstruction, and how far the prediction beats copying, in dB."""
    tokenizer, transformer = models
    with torch.no_grad():
        rebuilt = tokenizer.decode(tokenizer.encode(video))
    given, future = video[:, :, :GIVEN], video[:, :, GIVEN:]
    predicted = mf.generate(
        tokenizer, transformer, task="frame_prediction", video=given, **decoding
    )[:, :, GIVEN:]
    copied = given[:, :, -1:].expand_as(future)
    gain = psnr(predicted, future) - psnr(copied, future)
    return psnr(rebuilt, video).item(), gain.item()


def test_size_and_contents() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {str(path.relative_to(FOLDER)) for path in files if path.suffix != ".py"} == {
        "demo.json",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
        "transformer/config.json",
        "transformer/model.safetensors",
    }


def test_models_are_their_presets(models: Models) -> None:
    for model in models:
        preset = type(model).from_preset("magvit-v2-demo")
        shapes = {name: p.shape for name, p in preset.named_parameters()}
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_the_demo_s_promise(models: Models, facts: dict, tmp_path: Path) -> None:
    reconstruction, gain = _scores(models, _through_h264(None, tmp_path), facts["decoding"])
    assert reconstruction >= 26.0
    assert gain >= 1.5


def test_other_held_out_scenes_score_as_stated(models: Models, facts: dict, tmp_path: Path) -> None:
    scores = torch.tensor(
        [
            _scores(models, _through_h264(seed, tmp_path), facts["decoding"])
            for seed in HELD_OUT_SEEDS[1:7]
        ]
    )
    mean, stated = scores.mean(0), facts["held_out"]
    assert mean[0] >= 26.0
    assert mean[0] == pytest.approx(stated["psnr_reconstruction"], abs=1.5)
    assert mean[1] >= 1.5
    assert mean[1] == pytest.approx(stated["gain_over_copying"], abs=1.5)
