"""Every mask, condition, prompt and part of COMMIT on examples small enough to be worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magvit_fast.compat.magvit_sequences import Vocabulary, release_sequences, task_token
from magvit_fast.models import MaskedTransformer, MaskedTransformerConfig
from magvit_fast.tasks import TASKS, ClipGeometry, commit_loss, commit_mask

# A clip of 4 frames of 4 x 4 pixels, one token a pixel: the rules of pixels and tokens are seen alike.
GEOMETRY = ClipGeometry(4, 4, 4, (4, 4, 4), causal=False)
ALL, NONE = ["####"] * 4, ["...."] * 4
BOX = ["....", ".##.", ".##.", "...."]
HOLE = ["####", "#..#", "#..#", "####"]
# '#' is given; one picture a frame. The moving window is 2 wide and starts at 0, 1, 1, 2:
# round(0, 2/3, 4/3, 2).
MASKS: dict[str, list[list[str]]] = {
    "frame_prediction": [ALL, NONE, NONE, NONE],
    "class_frame_prediction": [ALL, NONE, NONE, NONE],
    "frame_interpolation": [ALL, NONE, NONE, ALL],
    "outpainting_central": [BOX] * 4,
    "outpainting_vertical": [[".##."] * 4] * 4,
    "outpainting_horizontal": [["....", "####", "####", "...."]] * 4,
    "outpainting_dynamic": [["##.."] * 4, [".##."] * 4, [".##."] * 4, ["..##"] * 4],
    "inpainting_central": [HOLE] * 4,
    "inpainting_dynamic": [
        ["####", "..##", "..##", "####"],
        ["####", "#..#", "#..#", "####"],
        ["####", "#..#", "#..#", "####"],
        ["####", "##..", "##..", "####"],
    ],
    "class_generation": [NONE] * 4,
}


def picture(frames: list[list[str]]) -> Tensor:
    return torch.tensor([[[c == "#" for c in row] for row in frame] for frame in frames])


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    assert set(MASKS) == set(TASKS)
    expected = picture(MASKS[name])
    assert torch.equal(TASKS[name].pixel_mask(GEOMETRY), expected)
    assert torch.equal(TASKS[name].token_mask(GEOMETRY), expected)


# One frame, rows and columns numbered: 12 is row 1, column 2. Frame t adds 100 * t.
FRAME = [[10 * row + column for column in range(4)] for row in range(4)]
PADDED = {  # frame 0 of the condition clip
    "outpainting_central": [[11, 11, 12, 12], [11, 11, 12, 12], [21, 21, 22, 22], [21, 21, 22, 22]],
    "outpainting_vertical": [[1, 1, 2, 2], [11, 11, 12, 12], [21, 21, 22, 22], [31, 31, 32, 32]],
    "outpainting_horizontal": [
        [10, 11, 12, 13], [10, 11, 12, 13], [20, 21, 22, 23], [20, 21, 22, 23],
    ],
    "outpainting_dynamic": [[0, 1, 0, 0], [10, 11, 0, 0], [20, 21, 0, 0], [30, 31, 0, 0]],
    "inpainting_central": [[0, 1, 2, 3], [10, 0, 0, 13], [20, 0, 0, 23], [30, 31, 32, 33]],
    "inpainting_dynamic": [[0, 1, 2, 3], [0, 0, 12, 13], [0, 0, 22, 23], [30, 31, 32, 33]],
}  # fmt: skip


def numbered_clip() -> Tensor:
    return torch.stack([torch.tensor(FRAME) + 100.0 * t for t in range(4)]).view(1, 1, 4, 4, 4)


@pytest.mark.parametrize("name", PADDED)
def test_condition_clips_of_regions(name: str) -> None:
    made = TASKS[name].condition_video(numbered_clip(), GEOMETRY)[0, 0]
    assert made[0].tolist() == PADDED[name]
    if "dynamic" not in name:  # the same place in every frame
        expected = torch.tensor(PADDED[name]) + 200.0
        given = torch.tensor(PADDED[name]) > 0 if "inpainting" in name else torch.ones(4, 4).bool()
        given[0, 0] = True
        assert torch.equal(made[2], expected * given)
    last = {"outpainting_dynamic": [0, 0, 312, 313], "inpainting_dynamic": [310, 311, 0, 0]}
    if name in last:
        assert made[3, 1].tolist() == last[name]


def test_condition_clips_of_frames() -> None:
    clip = numbered_clip()
    for name in ("frame_prediction", "class_frame_prediction"):
        made = TASKS[name].condition_video(clip, GEOMETRY)[0, 0]
        assert made[:, 1, 2].tolist() == [12.0] * 4
    made = TASKS["frame_interpolation"].condition_video(clip, GEOMETRY)[0, 0]
    assert made[:, 1, 2].tolist() == [12.0, 112.0, 212.0, 312.0]  # thirds of the way


PROMPTS = {  # the release's token, the row's name in a model with shared prompts
    "class_generation": (-3, "full_generation"),
    "frame_prediction": (-4, "frame_prediction"),
    "class_frame_prediction": (-4, "frame_prediction"),
    "frame_interpolation": (-5, "frame_interpolation"),
    "outpainting_central": (-6, "outpainting"),
    "outpainting_vertical": (-6, "outpainting"),
    "outpainting_horizontal": (-6, "outpainting"),
    "outpainting_dynamic": (-6, "outpainting"),
    "inpainting_central": (-6, "inpainting"),  # -7 with the release's correction
    "inpainting_dynamic": (-6, "inpainting"),
}


def test_prompts() -> None:
    assert set(PROMPTS) == set(TASKS)
    shape = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "mlp_size": 8, "grid": (1, 1, 1)}
    rows = (
        "full_generation",
        "frame_prediction",
        "frame_interpolation",
        "outpainting",
        "inpainting",
    )
    shared = MaskedTransformer(MaskedTransformerConfig(**shape, prompts=rows))  # type: ignore[arg-type]
    own = MaskedTransformer(MaskedTransformerConfig(**shape, prompts=tuple(TASKS)))  # type: ignore[arg-type]
    single = MaskedTransformer(MaskedTransformerConfig(**shape))  # type: ignore[arg-type]
    for number, (name, task) in enumerate(TASKS.items()):
        token, row = PROMPTS[name]
        assert task_token(task) == token
        corrected = -7 if row == "inpainting" else token
        assert task_token(task, patched_inpainting=True) == corrected
        assert shared.prompt_id(name, task.prompt) == rows.index(row)
        assert own.prompt_id(name, task.prompt) == number  # the paper: one prompt a task
        assert single.prompt_id(name, task.prompt) is None


def test_a_sequence_of_eight_tokens() -> None:
    """Outpainting of a vertical strip on a grid 1 x 2 x 4, codes 0..7, two classes, all worked out.

    The strip is the middle columns: positions 1, 2, 5, 6. Half of the eight are selected: those with
    the four lowest scores, 0, 1, 5 and 7. 1 and 5 are inside: refine. 0 and 7 are outside: mask.
    """
    geometry = ClipGeometry(1, 2, 4, (1, 2, 4), causal=False)
    task = TASKS["outpainting_vertical"]
    inside = task.token_mask(geometry).flatten()
    assert inside.tolist() == [False, True, True, False, False, True, True, False]
    z = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    z_condition = torch.tensor([[7, 6, 5, 4, 3, 2, 1, 0]])
    scores = torch.tensor([[0.1, 0.2, 0.8, 0.7, 0.6, 0.0, 0.5, 0.3]])
    batch = commit_mask(z, z_condition, inside, ratio=torch.tensor([0.5]), scores=scores)
    reconstruct, refine, mask = 0, 1, 2
    assert batch.part.tolist() == [
        [mask, refine, reconstruct, reconstruct, reconstruct, refine, reconstruct, mask]
    ]
    assert batch.mask[0].nonzero().flatten().tolist() == [0, 7]
    assert batch.tokens[0, 1:7].tolist() == [6, 2, 3, 4, 2, 6]

    vocabulary = Vocabulary(8, num_classes=2, num_special=16)
    assert (vocabulary.size, vocabulary.unconditional_class) == (27, 10)
    sequence = release_sequences(batch, vocabulary, task=task_token(task), unconditional_task=-3)
    # [prompt][no class][MASK 6 2 3 4 2 6 MASK]
    assert sequence.masked_inputs.tolist() == [[-6, 10, -1, 6, 2, 3, 4, 2, 6, -1]]
    # without a condition every selected position is MASK
    assert sequence.uncond_masked_inputs.tolist() == [[-3, 10, -1, -1, 2, 3, 4, -1, 6, -1]]
    assert sequence.targets.tolist() == [[-6, 10, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert sequence.weights.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert sequence.segment_ids.tolist() == [[0, 0, 0, 1, 0, 0, 0, 1, 0, 0]]
    single = release_sequences(
        batch, Vocabulary(8, 2, 1), class_id=torch.tensor([1]), prefix=z_condition[:, 1:3]
    )
    # [class 1][6 5][SEP] ...
    assert single.masked_inputs[0, :4].tolist() == [9, 6, 5, -2]

    # The network is sure of code 0 with p = 1/2 and the others share the rest: nats by hand.
    logits = torch.zeros(1, 8, 1, 8)
    logits[..., 0] = math.log(7.0)
    out = commit_loss(logits, batch, label_smoothing=0.0)
    right, wrong = math.log(2.0), math.log(14.0)
    assert out.parts["mask"].item() == pytest.approx((right + wrong) / 2)
    assert out.parts["refine"].item() == pytest.approx(wrong)
    assert out.parts["reconstruct"].item() == pytest.approx(wrong)
    assert out.loss.item() == pytest.approx((right + 7 * wrong) / 8)
    assert [out.fractions[p].item() for p in ("mask", "refine", "reconstruct")] == [
        0.25, 0.25, 0.5,
    ]  # fmt: skip
    assert [out.accuracies[p].item() for p in ("mask", "refine", "reconstruct")] == [0.5, 0.0, 0.0]
    for part, expected in (("mask", (right + wrong) / 2), ("refine", wrong)):
        only = commit_loss(logits, batch, label_smoothing=0.0, loss_on=(part,))  # type: ignore[arg-type]
        assert only.loss.item() == pytest.approx(expected)
