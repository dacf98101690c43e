"""Tiny models on disk and small video files for the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from magvit_fast.cli.main import main
from magvit_fast.data.synthetic import render_clip
from magvit_fast.data.video import write_video
from magvit_fast.models import (
    FrameTokenizer,
    FrameTokenizerConfig,
    MagvitConfig,
    MagvitTokenizer,
    MagvitV2Config,
    MagvitV2Tokenizer,
    MaskedTransformer,
    MaskedTransformerConfig,
    MaskViTConfig,
    MaskViTTransformer,
)
from magvit_fast.tasks import TASKS

pytest.importorskip("av")


@dataclass(frozen=True)
class Models:
    """Directories of a tokenizer (time stride 4, space stride 4, 6 bits) and its transformer."""

    tokenizer: str
    other_tokenizer: str
    transformer: str

    @property
    def both(self) -> list[str]:
        return ["--tokenizer", self.tokenizer, "--transformer", self.transformer]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    config = MagvitV2Config(
        filters=8,
        channel_multipliers=(1, 1, 1),
        temporal_downsample=(True, True),
        num_res_blocks=1,
        num_bits=6,
    )
    for seed, name in enumerate(("tokenizer", "other")):
        torch.manual_seed(seed)
        MagvitV2Tokenizer(config).save_pretrained(folder / name)
    transformer = MaskedTransformerConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        mlp_size=32,
        grid=(3, 4, 4),
        num_subtokens=2,
        subtoken_size=8,
        num_classes=2,
    )
    MaskedTransformer(transformer).save_pretrained(folder / "transformer")
    return Models(*(str(folder / name) for name in ("tokenizer", "other", "transformer")))


@pytest.fixture(scope="session")
def first_generation(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A MAGVIT pair: 8 frames of 16 x 16 <-> 4 x 4 x 4 tokens of 6 bits; all tasks, two classes."""
    folder = tmp_path_factory.mktemp("v1")
    tokenizer = MagvitConfig(
        filters=8,
        channel_multipliers=(1, 1, 1),
        temporal_downsample=(True, False),
        num_res_blocks=1,
        codebook_size=64,
        embedding_dim=8,
    )
    torch.manual_seed(2)
    MagvitTokenizer(tokenizer).save_pretrained(folder / "tokenizer")
    transformer = MaskedTransformerConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        mlp_size=32,
        grid=(4, 4, 4),
        num_subtokens=1,
        subtoken_size=64,
        num_classes=2,
        prompts=tuple(TASKS),
    )
    MaskedTransformer(transformer).save_pretrained(folder / "transformer")
    return [
        *("--tokenizer", str(folder / "tokenizer")),
        *("--transformer", str(folder / "transformer")),
    ]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 frames of 24 x 32 at 12 frames/s."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    pixels = torch.from_numpy(render_clip(1, 30, 32))[:, 4:28]
    write_video(path, pixels.permute(3, 0, 1, 2), 12.0)
    return str(path)


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run one command line in this process."""

    def run(*words: str | Path) -> Result:
        try:
            status = main([str(word) for word in words])
        except SystemExit as leave:
            status = int(leave.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def done(cli: Callable[..., Result]) -> Callable[..., None]:
    """Run a command line that must succeed: what it says otherwise is the test's failure."""

    def run(*words: str | Path) -> None:
        result = cli(*words)
        if result.status == 130:  # the command took a signal for itself that ends the tests
            raise KeyboardInterrupt
        assert result.status == 0, result.err

    return run


@pytest.fixture
def fails(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run a command line that must fail; returns its one line of error."""

    def run(*words: str | Path, status: int = 1) -> str:
        result = cli(*words)
        assert result.status == status, result
        assert result.out == ""
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("magvit-fast")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def maskvit_pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """16 x 16 pixels -> 4 x 4 tokens of 4 bits a frame; 6 frames, actions of 2 numbers."""
    folder = tmp_path_factory.mktemp("maskvit")
    torch.manual_seed(0)
    FrameTokenizer(
        FrameTokenizerConfig(
            filters=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, codebook_size=16,
            embedding_dim=4, norm_groups=4,
        )
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    MaskViTTransformer(
        MaskViTConfig(
            frames=6, grid=(4, 4), window=(2, 2), codebook_size=16, action_dim=2, hidden_size=16,
            num_blocks=1, num_heads=2, mlp_size=32, init_std=0.5,
        )
    ).save_pretrained(folder / "transformer")  # fmt: skip
    return ["--tokenizer", str(folder / "tokenizer"), "--transformer", str(folder / "transformer")]
