"""The release's sequences of ten tasks, several and single, and with the prefix condition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.goldens import load_goldens

from magvit_fast.compat.magvit_sequences import (
    SEPARATOR,
    Sequences,
    Vocabulary,
    release_sequences,
    task_token,
)
from magvit_fast.tasks import TASKS, ClipGeometry, CommitBatch, commit_mask

# the release's names of our tasks
NAMES = {
    "frame_prediction": "frame_prediction",
    "frame_interpolation": "frame_interpolation",
    "outpainting_h": "outpainting_horizontal",
    "outpainting_v": "outpainting_vertical",
    "outpainting_c": "outpainting_central",
    "outpainting_dv": "outpainting_dynamic",
    "inpainting_c": "inpainting_central",
    "inpainting_dv": "inpainting_dynamic",
    "full_generation": "class_generation",
    "frame_prediction_class": "class_frame_prediction",
}
FIELDS = ("masked_inputs", "uncond_masked_inputs", "targets", "weights", "segment_ids")
GEOMETRY = ClipGeometry(16, 64, 64, (4, 8, 8), causal=False)


def golden() -> dict[str, np.ndarray]:
    return load_goldens("magvit_v1/02b_token_sequences")


def get(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(golden()[name]))


def tokens(name: str) -> torch.Tensor:
    return get(name).long().flatten(1)


def compare(ours: Sequences, case: str) -> None:
    for field in FIELDS:
        expected = get(f"{case}/{field}")
        assert torch.equal(getattr(ours, field), expected.to(getattr(ours, field).dtype)), field


def test_every_task_has_a_name() -> None:
    assert set(golden()["tasks"]) == set(NAMES)
    assert set(NAMES.values()) == set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_multi_task_sequences_match_the_release(name: str) -> None:
    task, arrays = TASKS[NAMES[name]], golden()
    vocabulary = Vocabulary(
        int(arrays["codebook_size"]), int(arrays["num_classes"]), int(arrays["num_special"])
    )
    assert vocabulary == Vocabulary(1024, 5, 16)
    assert vocabulary.num_classes + 1 == int(arrays["num_class_rows"])
    assert vocabulary.size == int(arrays["vocab_size"])
    assert task_token(task) == int(arrays[f"{name}/task_token"])
    inside = None
    if task.has_condition:
        # the condition region is that of our own rule
        inside = task.token_mask(GEOMETRY).flatten()
        assert torch.equal(inside.expand(3, -1), tokens(f"{name}/cond_mask").bool())
    batch = commit_mask(
        tokens("z"),
        tokens("z_cond") if task.has_condition else None,
        inside,
        ratio=get(f"{name}/ratio"),
        scores=get(f"{name}/score").flatten(1),
    )
    sequences = release_sequences(
        batch,
        vocabulary,
        task=task_token(task),
        unconditional_task=task_token(TASKS["class_generation"]),
        class_id=get("label").long().flatten() if task.class_conditional else None,
    )
    compare(sequences, name)
    assert sequences.masked_inputs.shape[1] == 2 + GEOMETRY.num_tokens
    u = get(f"{name}/u")
    drawn = commit_mask(tokens("z"), u=u, scores=get(f"{name}/score").flatten(1))
    assert abs(int((drawn.part != 0).sum(1)[0]) - int((batch.part != 0).sum(1)[0])) <= 1


def single_batch() -> CommitBatch:
    return commit_mask(
        tokens("z"),
        ratio=get("single_cg/ratio").reshape(1),
        scores=get("single_cg/score").flatten(1),
    )


def test_single_task_sequences_match_the_release() -> None:
    arrays = golden()
    vocabulary = Vocabulary(1024, int(arrays["num_classes"]), int(arrays["single_cg/num_special"]))
    label = get("label").long().flatten()
    compare(release_sequences(single_batch(), vocabulary, class_id=label), "single_cg")


def test_prefix_condition_matches_the_release() -> None:
    vocabulary = Vocabulary(1024, int(golden()["num_classes"]), 1)
    prefix = tokens("z_cond")[:, :64]  # slot 0
    compare(release_sequences(single_batch(), vocabulary, prefix=prefix), "prefix_fp")
    # one special row: SEP counts back to the unconditional class
    assert vocabulary.size + SEPARATOR == vocabulary.unconditional_class


def test_published_vocabularies() -> None:
    assert Vocabulary(1024, num_classes=101, num_special=1).size == 1127
    assert Vocabulary(1024, num_classes=0, num_special=16).size == 1041


def test_the_weights_of_selected_positions_alone_and_the_correction_flag() -> None:
    batch = single_batch()
    sequences = release_sequences(batch, Vocabulary(), reconstruct=False)
    assert torch.equal(sequences.weights[:, 1:].bool(), batch.mask)
    assert task_token(TASKS["inpainting_central"], patched_inpainting=True) == -7
    assert task_token(TASKS["outpainting_central"], patched_inpainting=True) == -6


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"class_id: expected \[3\]"):
        release_sequences(single_batch(), Vocabulary(), class_id=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"class_id: expected ids in 0\.\.0"):
        release_sequences(single_batch(), Vocabulary(), class_id=torch.tensor([0, 0, 1]))
