"""Actions of a recorded video: a small array beside the video file.

For `clip.mp4` that is `clip.npy`, a numeric array [n, A], or `clip.npz` with such an array under the
name "actions". Row t is the action taken at frame t, which leads to frame t + 1; the last frame's row
may be left out (it then counts as zeros). Units are the user's; values of the order of one train
best.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magvit_fast.errors import FileFormatError

KEY = "actions"


def action_file(video: str | os.PathLike[str]) -> Path:
    """The file beside a video that holds its actions.

    Raises:
        FileFormatError: there is none; the message names both places.
    """
    path = Path(video)
    choices = (path.with_suffix(".npy"), path.with_suffix(".npz"))
    for choice in choices:
        if choice.is_file():
            return choice
    raise FileFormatError(
        f"{path}: has no actions beside it; expected {choices[0].name} or {choices[1].name} "
        "in the same folder"
    )


def read_actions(video: str | os.PathLike[str], frames: int) -> Tensor:
    """Actions of a video of so many frames: float32 [frames, A].

    Raises:
        FileFormatError: no such file, or one that holds something else; the message names it.
    """
    rows = read_action_array(action_file(video))
    if rows.shape[0] not in (frames, frames - 1):
        raise FileFormatError(
            f"{action_file(video)}: expected [{frames}, A] or [{frames - 1}, A] for a video of "
            f"{frames} frames, got {tuple(rows.shape)}"
        )
    return torch.nn.functional.pad(rows, (0, 0, 0, frames - len(rows)))


def read_action_array(path: Path) -> Tensor:
    """The array of one file, .npy or .npz: float32 [n, A].

    Raises:
        FileFormatError: a file that is missing or holds something else; the message names it.
    """
    try:
        with path.open("rb") as file:
            loaded: Any = np.load(file, allow_pickle=False)
            if path.suffix == ".npz":
                if KEY not in loaded:
                    raise FileFormatError(
                        f"{path}: expected an array named '{KEY}', found "
                        f"{', '.join(loaded.files) or 'none'}"
                    )
                loaded = loaded[KEY]
    except FileFormatError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileFormatError(
            f"{path}: cannot be read as a NumPy array ({error}); write it again with numpy.save"
        ) from error
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "fiub":
        raise FileFormatError(f"{path}: expected numbers, got {getattr(loaded, 'dtype', 'none')}")
    if loaded.ndim != 2 or loaded.shape[1] < 1:
        raise FileFormatError(f"{path}: expected [frames, A], got {loaded.shape}")
    rows = torch.from_numpy(loaded.astype(np.float32))
    if not rows.isfinite().all():
        raise FileFormatError(f"{path}: holds NaN or infinity")
    return rows
