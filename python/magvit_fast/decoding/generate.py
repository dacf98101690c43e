"""From a task to a video: condition, decoding (masked or autoregressive), detokenization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from magvit_fast.decoding._inputs import (
    Tokenizer,
    check_devices,
    checked_classes,
    checked_video,
    count_windows,
    evaluation,
)
from magvit_fast.decoding.autoregressive import AutoregressiveDecoding, decode_autoregressive
from magvit_fast.decoding.confidence import Noise
from magvit_fast.decoding.masked import MaskedDecoding, Predict, decode_masked
from magvit_fast.decoding.maskvit import MaskViTDecoding, frame_geometry, generate_frames
from magvit_fast.decoding.schedules import Guidance
from magvit_fast.decoding.sliding import slide
from magvit_fast.models.autoregressive_transformer import AutoregressiveTransformer
from magvit_fast.models.masked_transformer import TokenTransformer
from magvit_fast.models.maskvit import MaskViTTransformer
from magvit_fast.ops._checks import check_choice, check_number
from magvit_fast.tasks.commit import CONDITION_MODES, ConditionMode
from magvit_fast.tasks.registry import ClipGeometry, Task, get_task

T = TypeVar("T")


def clip_geometry(
    tokenizer: Tokenizer, transformer: TokenTransformer | MaskViTTransformer
) -> ClipGeometry:
    """The clip, in pixels and tokens, that this pair of models makes.

    Raises:
        ValueError: the two do not fit: their tokens have different numbers of bits.
    """
    if isinstance(transformer, MaskViTTransformer):
        return frame_geometry(tokenizer, transformer)
    ours, theirs = transformer.config, tokenizer.config
    if ours.num_bits != theirs.num_bits:
        raise ValueError(
            f"transformer: its {ours.num_subtokens} x {ours.subtoken_size} sub-tokens hold "
            f"{ours.num_bits} bits, but the tokenizer's ids have {theirs.num_bits} bits; "
            "use the transformer that was trained on this tokenizer's tokens"
        )
    slots, rows, columns = ours.grid
    causal = getattr(theirs, "causal", True)
    frames = 1 + (slots - 1) * theirs.time_stride if causal else slots * theirs.time_stride
    ahead, stride = causal and not getattr(theirs, "streams", True), theirs.space_stride
    return ClipGeometry(frames, rows * stride, columns * stride, ours.grid, causal, ahead)


def generate(
    tokenizer: Tokenizer,
    transformer: TokenTransformer | MaskViTTransformer,
    *,
    task: str | Task,
    video: Tensor | None = None,
    class_id: int | Sequence[int] | Tensor | None = None,
    goal: Tensor | None = None,
    actions: Tensor | None = None,
    steps: int = 12,
    schedule: str = "cosine",
    choice_temperature: float | None = 4.5,
    temperature: float = 1.0,
    guidance: float | Guidance = 0.0,
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 0.0,
    condition_mode: ConditionMode = "commit",
    frames: int | None = None,
    noise: Sequence[Noise] | Tensor | None = None,
) -> Tensor:
    """Generate video by masked decoding (MAGVIT, algorithm 1): [B, C, T, H, W] in [0, 1].

    With an AutoregressiveTransformer, token after token instead (see decoding.autoregressive): of
    the settings it takes temperature, top_k, top_p, guidance, seed and noise; steps, schedule and
    choice_temperature say nothing there.

    With a FrameTokenizer and a MaskViTTransformer, by MaskViT's rules (see decoding.maskvit): given
    frames stay, frame_prediction (1 given frame; dataclasses.replace for more) and
    frame_interpolation are its tasks, goal and actions its own arguments.

    Args:
        tokenizer, transformer: a pair that fits, on one device. Size and length of a clip are those
            of the transformer's grid; MaskedTransformer.with_grid gives it another one.
        task: a name of tasks.TASKS, or a Task (dataclasses.replace changes, say, the number of
            given frames).
        video: [B, C, T, H, W] in [0, 1] of the models' size for tasks with a condition. Frame
            prediction looks at its first frames alone (5 for a causal tokenizer), interpolation at
            both ends, the others at all frames of one clip. None for class_generation.
        class_id: for the two class-conditional tasks, one id or B of them.
        goal: MaskViT: the frame that the clip is to end with, [B, C, H, W] in [0, 1].
        actions: MaskViT with actions: [B, frames of the result, A], row t is taken at frame t.
        steps, schedule, choice_temperature, temperature, top_k, top_p: see decoding.MaskedDecoding;
            choice_temperature None = 0, no noise.
        guidance: the scale s in conditional + s * (conditional - unconditional), or a Guidance.
        seed: same seed, same device, same inputs: same video.
        condition_mode: how the model was trained, see tasks.commit_mask: "commit" refines the
            condition tokens; "fixed" keeps them; "latent" (latent masking) keeps the true tokens of
            the region, which a tokenizer that looks ahead makes of the whole clip: `video` is then
            the true clip, all frames of it, of one clip's length. (The released code has no way to
            evaluate "latent": it feeds zeros.) A prefix condition is the model's own, no mode.
        frames: length of the result; None = one clip. Frame prediction goes on for as long as it is
            told (see generate_stream); other tasks make one clip.
        noise: one pair of Gumbel arrays a step in place of the seeded draws (a single clip only);
            for an autoregressive transformer one array [B, N, G, V].

    The result holds the model's version of the given part too: nothing is pasted back. Both models
    run in evaluation mode, without gradients, and are left in the mode they came in.

    Raises:
        ValueError, TypeError: unknown task, missing or superfluous video or class_id, wrong size,
            clip too short, models that do not fit each other; the message names the argument and
            both sides.
    """
    pieces = generate_stream(
        tokenizer,
        transformer,
        task=task,
        video=video,
        class_id=class_id,
        goal=goal,
        actions=actions,
        steps=steps,
        schedule=schedule,
        choice_temperature=choice_temperature,
        temperature=temperature,
        guidance=guidance,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        condition_mode=condition_mode,
        frames=frames,
        noise=noise,
    )
    return torch.cat(list(pieces), dim=2)


def generate_stream(
    tokenizer: Tokenizer,
    transformer: TokenTransformer | MaskViTTransformer,
    *,
    task: str | Task,
    video: Tensor | None = None,
    class_id: int | Sequence[int] | Tensor | None = None,
    goal: Tensor | None = None,
    actions: Tensor | None = None,
    steps: int = 12,
    schedule: str = "cosine",
    choice_temperature: float | None = 4.5,
    temperature: float = 1.0,
    guidance: float | Guidance = 0.0,
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 0.0,
    condition_mode: ConditionMode = "commit",
    frames: int | None = None,
    noise: Sequence[Noise] | Tensor | None = None,
) -> Iterator[Tensor]:
    """What `generate` makes, piece by piece: videos [B, C, n, H, W] that follow each other.

    Arguments are those of `generate` and are looked at now; a piece is computed when it is asked
    for. What is kept between pieces (a clip's tokens, a few frames, the decoder's memory) does not
    grow with the video.

    Long videos slide: the last frames of what is there are the given frames of the next clip, whose
    new tokens follow. A tokenizer that streams (MAGVIT-v2), given frames that fill whole slots (1 +
    s_t k of them), decodes the new slots as a continuation of the ones before, so that the video is
    exactly tokenizer.decode of all tokens. Any other decodes each clip by itself and drops its
    version of the given frames.
    """
    chosen = task if isinstance(task, Task) else get_task(task)
    geometry = clip_geometry(tokenizer, transformer)
    if not isinstance(guidance, Guidance):
        guidance = Guidance(check_number("guidance", guidance))
    common: dict[str, Any] = {
        "steps": steps,
        "schedule": schedule,
        "temperature": temperature,
        "choice_temperature": 0.0 if choice_temperature is None else choice_temperature,
        "guidance": guidance,
        "seed": seed,
        "top_k": top_k,
        "top_p": top_p,
    }
    if isinstance(transformer, MaskViTTransformer):
        if class_id is not None:
            raise ValueError(f"class_id: expected None, MaskViT has no classes; got {class_id!r}")
        if condition_mode != "commit":
            raise ValueError(
                "condition_mode: expected the default, MaskViT always keeps what is given; "
                f"got {condition_mode!r}"
            )
        return generate_frames(
            tokenizer, transformer, chosen, MaskViTDecoding(**common),
            video=video, goal=goal, actions=actions, frames=frames,
            noise=None if noise is None else list(noise),
        )  # fmt: skip
    if goal is not None or actions is not None:
        raise ValueError(
            "goal, actions: expected None, only a MaskViTTransformer takes them; this one is a "
            f"{type(transformer).__name__}"
        )
    settings: MaskedDecoding | AutoregressiveDecoding
    if isinstance(transformer, AutoregressiveTransformer):
        if condition_mode != "commit":
            raise ValueError(
                "condition_mode: expected 'commit' for an autoregressive transformer, got "
                f"{condition_mode!r}"
            )
        settings = AutoregressiveDecoding(temperature, top_k, top_p, seed, guidance)
        passes = geometry.num_tokens
    else:
        check_choice("condition_mode", condition_mode, CONDITION_MODES)
        settings = MaskedDecoding(**common, fixed_condition=condition_mode != "commit")
        passes = steps
    video = checked_video(chosen, geometry, video)
    classes = checked_classes(chosen, transformer, class_id, None if video is None else len(video))
    check_devices(tokenizer, transformer, video)
    windows, given = count_windows(chosen, geometry, frames)
    if condition_mode == "latent":
        _check_true_clip(geometry, video, windows)
    if noise is not None and windows > 1:
        raise ValueError(f"noise: expected None for a result of {windows} clips, got {len(noise)}")

    def tokens(window: int, given_video: Tensor | None) -> Tensor:
        return generate_tokens(
            tokenizer,
            transformer,
            chosen,
            settings,
            video=given_video,
            classes=classes,
            true_condition=condition_mode == "latent",
            noise=noise,
            first_step=window * passes,
        )

    length = geometry.frames + (windows - 1) * (geometry.frames - given)
    return slide(tokenizer, tokens, video, windows, given, length if frames is None else frames)


@torch.no_grad()
def generate_tokens(
    tokenizer: Tokenizer,
    transformer: TokenTransformer,
    task: Task,
    settings: MaskedDecoding | AutoregressiveDecoding,
    *,
    video: Tensor | None = None,
    classes: Tensor | None = None,
    true_condition: bool = False,
    noise: Sequence[Noise] | Tensor | None = None,
    first_step: int = 0,
) -> Tensor:
    """The tokens of one generated clip: int64 [B, T', H', W'].

    video [B, C, T, H, W] and classes int64 [B] as the task needs them; true_condition: the condition
    tokens are those of `video` itself, not of the condition clip. Settings are those of the
    transformer's kind. The rest as in generate, decode_masked and decode_autoregressive.
    """
    geometry = clip_geometry(tokenizer, transformer)
    device = transformer.position_embedding.device
    region = task.token_mask(geometry).flatten().to(device)
    _check_prefix(transformer, task, int(region.sum()))
    with evaluation(tokenizer, transformer):
        condition = None
        if video is not None and task.has_condition:
            shown = video if true_condition else task.condition_video(video, geometry)
            condition = _tokens_of(tokenizer, geometry, shown[:, :, : geometry.frames], region)
        batch = len(condition) if condition is not None else 1 if classes is None else len(classes)
        prefix = None
        if condition is not None and transformer.config.condition_tokens:
            prefix, condition, region = condition[:, region], None, torch.zeros_like(region)
        if condition is None:
            condition = torch.zeros(batch, geometry.num_tokens, dtype=torch.int64, device=device)
        if isinstance(transformer, AutoregressiveTransformer):
            tokens = decode_autoregressive(
                transformer,
                _of_kind(AutoregressiveDecoding, settings),
                batch=batch,
                class_id=classes,
                prompt_id=transformer.prompt_id(task.name, task.prompt),
                condition=prefix,
                unconditional_prompt_id=_free_prompt(transformer, task),
                noise=None if noise is None else _of_kind(Tensor, noise),
                first_step=first_step,
            )
        else:
            conditional, unconditional = _networks(transformer, task, classes, prefix)
            tokens = decode_masked(
                conditional,
                condition,
                region,
                _of_kind(MaskedDecoding, settings),
                predict_unconditional=unconditional,
                noise=None if noise is None else list(noise),
                first_step=first_step,
            )
    return tokens.view(-1, *geometry.grid)


def _of_kind(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(
            f"settings, noise: expected {kind.__name__} for this transformer, "
            f"got {type(value).__name__}"
        )
    return value


def _check_true_clip(geometry: ClipGeometry, video: Tensor | None, windows: int) -> None:
    got = 0 if video is None else video.shape[2]
    if windows > 1 or 0 < got < geometry.frames:
        raise ValueError(
            f"video: condition_mode 'latent' needs the true clip, {geometry.frames} frames, and makes "
            f"one clip; got {got} frames for {windows} clips"
        )


def _tokens_of(
    tokenizer: Tokenizer, geometry: ClipGeometry, clip: Tensor, region: Tensor
) -> Tensor:
    """int64 [B, N], true inside the region bool [N]; what is behind its last slot may be zeros.

    A causal tokenizer is not shown the frames behind that slot: 5 of 17 for MAGVIT-v2's frame
    prediction. One whose norms span the clip sees the whole condition clip, as in training.
    """
    slots = geometry.grid[0]
    if geometry.causal and not geometry.looks_ahead and bool(region.any()):
        slots = 1 + int(region.view(slots, -1).any(1).nonzero()[-1])
        stride = (geometry.frames - 1) // max(1, geometry.grid[0] - 1)
        clip = clip[:, :, : 1 + (slots - 1) * stride]
    ids = tokenizer.encode(clip)
    if tuple(ids.shape[1:]) != (slots, *geometry.grid[1:]):
        raise ValueError(
            f"transformer: its grid is {geometry.grid}, but the tokenizer makes "
            f"{tuple(ids.shape[1:])} tokens of {clip.shape[2]} frames of "
            f"{geometry.height}x{geometry.width}"
        )
    return F.pad(ids.flatten(1), (0, geometry.num_tokens - ids[0].numel()))


def _check_prefix(transformer: TokenTransformer, task: Task, tokens: int) -> None:
    """A model with the prefix condition takes regions of one size; an autoregressive one has no other."""
    wanted = transformer.config.condition_tokens
    interior = wanted == 0 and not isinstance(transformer, AutoregressiveTransformer)
    if not interior and tokens != wanted:
        raise ValueError(
            f"transformer: its prefix holds {wanted} condition tokens, but the region of task "
            f"{task.name} has {tokens}; use the model that was trained for this task"
        )


def _networks(
    transformer: TokenTransformer, task: Task, classes: Tensor | None, prefix: Tensor | None
) -> tuple[Predict, Predict]:
    prompt, free = transformer.prompt_id(task.name, task.prompt), _free_prompt(transformer, task)

    def conditional(tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = transformer(
            tokens, mask, class_id=classes, prompt_id=prompt, condition=prefix
        )
        return logits

    def unconditional(tokens: Tensor, mask: Tensor) -> Tensor:
        # a prefix condition stays, as in the released code
        logits: Tensor = transformer(tokens, mask, prompt_id=free, condition=prefix)
        return logits

    return conditional, unconditional


def _free_prompt(transformer: TokenTransformer, task: Task) -> int | None:
    """Of guidance's unconditional pass: "full generation" where the model knows it (released code)."""
    full = ("class_generation", "full_generation")
    if not set(full).isdisjoint(transformer.config.prompts):
        return transformer.prompt_id(*full)
    return transformer.prompt_id(task.name, task.prompt)
