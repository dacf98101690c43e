"""What a recipe of MaskViT's second stage is made of, and which stage-two recipe a file is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from magvit_fast.models.maskvit import MaskViTConfig
from magvit_fast.tasks import given_frames
from magvit_fast.training.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TokensConfig,
    TransformerTraining,
    load_recipe,
    read_table,
)


@dataclass(frozen=True)
class FutureConfig:
    """What MaskViT learns: the frames after the given ones (see tasks.mask_future).

    given_frames: leading frames that are given. goal: the last frame is given too.
    mask_ratio: range of the share of future tokens that is masked, drawn for each video; the same
        number twice is the paper's ablation of one fixed ratio (0.75, 0.9, 0.95, 0.98).
    """

    given_frames: int = 1
    goal: bool = False
    mask_ratio: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        low, high = self.mask_ratio
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"mask_ratio: expected 0 <= low <= high <= 1, got {self.mask_ratio}")
        if self.given_frames < 1:
            raise ValueError(f"given_frames: expected at least 1, got {self.given_frames}")


@dataclass(frozen=True)
class MaskViTTraining:
    """Stage two of MaskViT: a TOML recipe whose [model] says system = "maskvit".

    tokenizer: a folder, hub id or output of stage one. With model.action_dim above 0 the data have
    actions (data.actions). The optimizer's defaults are Adam at 3e-4 as notes on the paper have it;
    its betas are not published.
    """

    run: RunConfig
    tokenizer: str
    tokens: TokensConfig
    data: DataConfig
    model: MaskViTConfig = field(default_factory=MaskViTConfig)
    task: FutureConfig = field(default_factory=FutureConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-4, betas=(0.9, 0.999), warmup_steps=5000
        )
    )

    def __post_init__(self) -> None:
        if (
            self.data.frames != self.model.frames
        ):  # of fewer, generation would use what is untrained
            raise ValueError(
                f"data.frames: expected model.frames = {self.model.frames}, whose positions are all "
                f"trained, got {self.data.frames}"
            )
        if self.model.action_dim and not self.data.actions:
            raise ValueError(
                f"data.actions: expected true for a model with action_dim {self.model.action_dim}"
            )
        try:
            given_frames(self.data.frames, self.task.given_frames, goal=self.task.goal)
        except ValueError as error:
            message = str(error).replace("first:", "task.given_frames:", 1)
            raise ValueError(message) from error


def load_transformer_recipe(
    path: str | os.PathLike[str],
) -> TransformerTraining | MaskViTTraining:
    """Read a recipe of stage two, of MaskViT where its [model] says system = "maskvit".

    Raises FileFormatError as `load_recipe`.
    """
    model = read_table(path).get("model")
    if isinstance(model, dict) and model.get("system") == "maskvit":
        return load_recipe(path, MaskViTTraining)
    return load_recipe(path, TransformerTraining)
