"""What a training run is made of: dataclasses, and the strict reader of TOML recipes for them.

A recipe has one table per field below; what it leaves out keeps the default, which is MAGVIT-v2's
published value where there is one, whatever the model's system: recipes of MAGVIT and MaskViT state
what differs (recipes/magvit-b-*, maskvit-*). A table of a model may start from a preset
(`preset = "magvit-v2-base"`).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from magvit_fast.errors import FileFormatError
from magvit_fast.models.discriminator import DiscriminatorConfig
from magvit_fast.models.frame_tokenizer import FrameTokenizerConfig
from magvit_fast.models.magvit import MagvitConfig
from magvit_fast.models.magvit_v2 import MagvitV2Config
from magvit_fast.models.masked_transformer import MaskedTransformerConfig
from magvit_fast.models.maskvit import MaskViTConfig
from magvit_fast.models.presets import preset
from magvit_fast.tasks import PARTS, Part, get_task
from magvit_fast.training.losses import TokenizerLossWeights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

# How the condition reaches the network in training: tasks.ConditionMode and the prefix condition.
TrainingCondition = Literal["commit", "latent", "fixed", "prefix"]

# Config class -> the model class under which models/presets.py lists its presets.
_PRESET_OWNERS: dict[type, str] = {
    MagvitConfig: "MagvitTokenizer",
    MagvitV2Config: "MagvitV2Tokenizer",
    FrameTokenizerConfig: "FrameTokenizer",
    DiscriminatorConfig: "Discriminator3D",
    MaskedTransformerConfig: "MaskedTransformer",
    MaskViTConfig: "MaskViTTransformer",
}

# What `system` says in the table of a model; a table that can be of several classes is of the first
# one that its type names where it does not say.
_SYSTEMS: dict[type, str] = {
    MagvitV2Config: "magvit-v2",
    MagvitConfig: "magvit",
    FrameTokenizerConfig: "maskvit",
    MaskViTConfig: "maskvit",
}


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from and how they are cut.

    source: "videos" reads `path` (a folder, or a text file that lists files); "scenes" renders
        `scenes` synthetic training scenes, "calm-scenes" as many of the simpler ones of
        data/calm_scenes.py.
    frames, size: of a clip. strides, crop_scale, flip: see data.clips.Augmentation.
    image_ratio: share of batches made of single images instead of clips, spread evenly over the
        steps: 0.25 makes every fourth batch one of images (which have the clips' size).
    image_path: where those images come from, a folder or list as `path`; empty: single frames of
        the clips, and the image files beside them. Images alone need no ratio: frames = 1.
    labels: a video's class is the name of its folder, a scene's the color of its floor.
    actions: a video's actions are in a NumPy file beside it, see data/actions.py; needs strides [1]
        and no flip.
    """

    source: Literal["videos", "scenes", "calm-scenes"] = "videos"
    path: str = ""
    image_path: str = ""
    scenes: int = 100_000
    frames: int = 17
    size: int = 128
    strides: tuple[int, ...] = (1,)
    crop_scale: tuple[float, float] = (0.8, 1.0)
    flip: bool = True
    image_ratio: float = 0.0
    labels: bool = False
    actions: bool = False

    def __post_init__(self) -> None:
        if self.actions and (self.source != "videos" or self.flip or self.strides != (1,)):
            raise ValueError(
                "actions: expected source 'videos', strides [1] and flip false beside it, got "
                f"{self.source!r}, {list(self.strides)} and {self.flip}"
            )
        if self.source == "videos" and not self.path:
            raise ValueError("path: expected a folder or list of videos, got an empty name")
        if not 0.0 <= self.image_ratio <= 1.0:
            raise ValueError(f"image_ratio: expected a share in [0, 1], got {self.image_ratio}")
        if self.image_path and not self.image_ratio:
            raise ValueError(
                f"image_path: no batch takes images while image_ratio is 0, got {self.image_path!r}"
            )
        for name in ("scenes", "frames", "size"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam (weight_decay 0) or AdamW; linear warm-up, then a cosine down to 0 at the last step.

    clip_norm: the gradients' global norm is cut to this; 0 turns that off.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        _positive("learning_rate", self.learning_rate)
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class RunConfig:
    """How a run goes.

    output: folder of checkpoints, logs and the final model.
    batch_size: clips in an optimizer step, over all processes and accumulated parts together.
    gradient_accumulation: parts that a process cuts its share of the batch into. The entropy of the
        codebook and LeCam's means are then those of one part.
    mixed_precision: of Accelerate. workers: loader processes (0: none).
    """

    output: str
    steps: int
    batch_size: int
    gradient_accumulation: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    workers: int = 2
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output: expected a folder, got an empty name")
        for name in ("steps", "batch_size", "gradient_accumulation"):
            _at_least(name, getattr(self, name), 1)
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "workers"):
            _at_least(name, getattr(self, name), 0)
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                "batch_size: expected a multiple of gradient_accumulation "
                f"({self.gradient_accumulation}), got {self.batch_size}"
            )


@dataclass(frozen=True)
class EntropyConfig:
    """Annealing of the model's entropy_weight: times start_factor at step 0, falling linearly to
    times 1 at anneal_steps (MAGVIT-v2: 3 and 2000; losses.entropy_weight tells the other reading)."""

    start_factor: float = 3.0
    anneal_steps: int = 2000

    def __post_init__(self) -> None:
        _at_least("start_factor", self.start_factor, 0)
        _at_least("anneal_steps", self.anneal_steps, 0)


@dataclass(frozen=True)
class TokenizerTraining:
    """Stage one. The discriminator's clip is set from [data]; loss.adversarial 0 trains without it.

    A frame-by-frame (2D) model and its discriminator take the frames of all clips as one batch of
    images, so that data.frames above 1 only spares the reading of files.

    model: of MAGVIT-v2; of MAGVIT where its table says system = "magvit", of MaskViT where it says
        "maskvit". The other defaults stay MAGVIT-v2's. MAGVIT's released values differ from them in
        loss.reconstruction = 1, loss.lecam = 0, entropy.anneal_steps = 0 (a constant weight) and
        discriminator.pooling = "average".
    init_from: a folder or hub id of a tokenizer whose weights this one starts with: one of the same
        layout, or a 2D one (frame_by_frame), whose kernels are inflated.
    init_discriminator_from: the same for the discriminator (`run.output`/discriminator of that run).
        MAGVIT inflates both; MAGVIT-v2's discriminator starts from scratch.
    inflation: see models.inflation; "auto" is the published "last" for causal models and "central"
        for others, discriminators among them.
    perceptual_weights: a folder or hub id of an ImageNet ResNet-50 (see training/perceptual.py); empty
        leaves the perceptual loss out. ema_decay: of the generator's average, which is the result.
    recompute_levels: see MagvitV2Tokenizer.set_gradient_checkpointing.
    """

    run: RunConfig
    data: DataConfig
    model: MagvitV2Config | MagvitConfig | FrameTokenizerConfig = field(
        default_factory=MagvitV2Config
    )
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: TokenizerLossWeights = field(default_factory=TokenizerLossWeights)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init_from: str = ""
    init_discriminator_from: str = ""
    inflation: Literal["auto", "central", "average", "last"] = "auto"
    perceptual_weights: str = ""
    ema_decay: float = 0.999
    recompute_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        stride = self.model.time_stride
        lead = 1 if self.model.causal else 0
        if (self.data.frames - lead) % stride:
            expected = f"1 + {stride}k" if lead else f"a multiple of {stride}"
            raise ValueError(
                f"data.frames: expected {expected} for this model, got {self.data.frames}"
            )
        if self.data.image_ratio > 0 and (1 - lead) % stride:
            raise ValueError(
                f"data.image_ratio: this model takes clips of {stride}k frames and no single "
                f"images, got {self.data.image_ratio}"
            )
        if self.data.size % self.model.space_stride:
            raise ValueError(
                f"data.size: expected a multiple of {self.model.space_stride} for this model, "
                f"got {self.data.size}"
            )


@dataclass(frozen=True)
class TokensConfig:
    """path: folder of token shards; written first, from [data] by the tokenizer, if it has none.

    passes: how many differently augmented draws of each clip are tokenized.
    """

    path: str
    passes: int = 1
    shard_size: int = 4096
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("passes", "shard_size", "batch_size"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class TaskConfig:
    """What the transformer learns: a name of mf.tasks.TASKS, or several in `names`.

    names: one model for all of these; each step is for one of them (tasks.task_sequence). weights: how
        often each is drawn, relative to each other; empty: all alike.
    given_frames: leading frames of the frame prediction tasks; 0 keeps the task's own number.
    class_drop: share of samples whose class is replaced by "no class" (for guidance).
    ratio_per_sample: draw the mask ratio for each sample instead of once a batch (see tasks.commit).
    condition_mode: "commit", or an ablation of the paper: "latent" (latent masking) and "fixed", see
        tasks.commit_mask; "prefix" puts the condition tokens in front, and model.condition_tokens is
        then their number. An autoregressive model has no way but "prefix".
    loss_on: the parts of COMMIT's loss that count (all three; fewer is table 5's ablation). The log
        has all parts in any case.
    """

    name: str = "frame_prediction"
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    given_frames: int = 0
    class_drop: float = 0.1
    ratio_per_sample: bool = False
    condition_mode: TrainingCondition = "commit"
    loss_on: tuple[Part, ...] = PARTS
    label_smoothing: float = 1e-4

    def __post_init__(self) -> None:
        if not self.loss_on:
            raise ValueError(f"loss_on: expected some of {', '.join(PARTS)}, got none")
        try:
            [get_task(name) for name in self.all_names]
        except ValueError as error:
            key = "names" if self.names else "name"
            raise ValueError(str(error).replace("task:", f"{key}:", 1)) from error
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names: expected each task once, got {list(self.names)}")
        if self.weights and (len(self.weights) != len(self.names) or min(self.weights) <= 0):
            raise ValueError(
                f"weights: expected {len(self.names)} positive numbers, one for each of names, "
                f"got {list(self.weights)}"
            )
        for name in ("class_drop", "label_smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")

    @property
    def all_names(self) -> tuple[str, ...]:
        return self.names or (self.name,)


@dataclass(frozen=True)
class TransformerTraining:
    """Stage two. tokenizer: a folder, hub id or output of stage one.

    objective: "masked" trains a MaskedTransformer, "autoregressive" an AutoregressiveTransformer of the
        same [model] by next-token cross-entropy (the baseline; no COMMIT masking).
    """

    run: RunConfig
    tokenizer: str
    tokens: TokensConfig
    data: DataConfig
    model: MaskedTransformerConfig = field(default_factory=MaskedTransformerConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            betas=(0.9, 0.96), weight_decay=0.045, warmup_steps=5000, clip_norm=1.0
        )
    )
    objective: Literal["masked", "autoregressive"] = "masked"

    def __post_init__(self) -> None:
        task, model = self.task, self.model
        if len(task.all_names) > 1 and not model.prompts:
            raise ValueError(
                f"model.prompts: expected rows for the {len(task.all_names)} tasks, got none"
            )
        conditional = any(get_task(name).has_condition for name in task.all_names)
        prefix = task.condition_mode == "prefix"
        if self.objective == "autoregressive" and conditional and not prefix:
            raise ValueError(
                "task.condition_mode: expected 'prefix', the only condition of an autoregressive "
                f"model, got {task.condition_mode!r}"
            )
        if (conditional and prefix) != (model.condition_tokens > 0):
            raise ValueError(
                "model.condition_tokens: expected the number of condition tokens with "
                f"task.condition_mode 'prefix' and 0 without, got {model.condition_tokens} with "
                f"{task.condition_mode!r} and {', '.join(task.all_names)}"
            )


def load_recipe(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Read a TOML recipe into TokenizerTraining or TransformerTraining.

    Raises FileFormatError, which names the file and the key: no TOML, an unknown or missing key, a
    value of the wrong type or outside its range.
    """
    return _build(kind, read_table(path), f"{path}: ", "", None)


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file. Raises FileFormatError for a file that cannot be read as such."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: cannot be read ({error}); give a TOML recipe") from error
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"{path}: is no valid TOML: {error}") from error


def _build(kind: type[T], table: dict[str, Any], file: str, prefix: str, base: T | None) -> T:
    """A dataclass from a table, over the values of `base` where there is one."""
    table, fields = dict(table), dataclasses.fields(kind)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if kind in _PRESET_OWNERS and "preset" in table:
        name = table.pop("preset")
        try:
            values = preset(_PRESET_OWNERS[kind], name)
        except ValueError as error:
            raise FileFormatError(f"{file}key '{prefix}preset': {error}") from error
    elif base is not None:
        values = {f.name: getattr(base, f.name) for f in fields}
    else:  # the defaults, so that a nested table can start from them
        values = {f.name: _default(f) for f in fields if _default(f) is not dataclasses.MISSING}
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            raise FileFormatError(
                f"{file}unknown key '{prefix}{key}'; known are {', '.join(sorted(hints))}"
            )
        values[key] = _convert(value, hints[key], file, prefix + key, values.get(key))
    for f in fields:
        if f.name not in values and _default(f) is dataclasses.MISSING:
            raise FileFormatError(f"{file}key '{prefix}{f.name}' is missing")
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        name, _, fault = str(error).partition(": ")
        raise FileFormatError(f"{file}key '{prefix}{name}': {fault}") from error


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _convert(value: Any, hint: Any, file: str, key: str, base: Any) -> Any:
    """The value as the type of the field, or an error that names file and key."""
    origin, arguments = get_origin(hint), get_args(hint)
    systems = [choice for choice in (arguments or [hint]) if choice in _SYSTEMS]
    if systems and isinstance(value, dict):
        value = dict(value)
        names = [_SYSTEMS[choice] for choice in systems]
        system = value.pop("system", names[0])
        if system not in names:
            known = " or ".join(map(repr, names))
            raise FileFormatError(f"{file}key '{key}.system': expected {known}, got {system!r}")
        chosen = systems[names.index(system)]
        return _build(chosen, value, file, f"{key}.", base if type(base) is chosen else None)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, file, f"{key}.", base)  # type: ignore[arg-type]
    if origin is Literal:
        if value in arguments:
            return value
    elif origin in (Union, types.UnionType):
        for choice in arguments:
            if choice is not type(None):
                return _convert(value, choice, file, key, base)
    elif origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            pairs = enumerate(zip(value, arguments, strict=True))
            return tuple(_convert(v, h, file, f"{key}[{i}]", None) for i, (v, h) in pairs)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise FileFormatError(f"{file}key '{key}': expected {_name(hint)}, got {value!r}")


def _name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return "a table"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple:
        many = arguments[-1] is Ellipsis
        return f"a list of {'' if many else f'{len(arguments)} x '}{_name(arguments[0])}"
    return str(getattr(hint, "__name__", hint))
