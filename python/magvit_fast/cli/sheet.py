"""The demo's picture: frames of several videos side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from magvit_fast.data.atomic import atomic_path
from magvit_fast.errors import MissingExtraError

_COLUMNS = 9
_GIVEN, _MADE = "0.45", "#c03a2b"


def check_matplotlib() -> None:
    """Raises MissingExtraError: better before the work than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "cli", "drawing the sheet of frames") from error


def write_sheet(path: Path, rows: Mapping[str, Tensor], given: int, *, predicted: str) -> None:
    """Write a PNG, whole or not at all.

    Args:
        path: destination.
        rows: label -> video [3, T, H, W] in [0, 1]; all of one length. Labels may have two lines.
        given: number of leading frames that the predictor was shown.
        predicted: the label of the row whose later frames are predictions (framed in red).
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    length = min(video.shape[1] for video in rows.values())
    columns = min(_COLUMNS, length)
    shown = [round(i * (length - 1) / max(columns - 1, 1)) for i in range(columns)]
    figure = Figure(figsize=(1.6 + 1.25 * columns, 0.5 + 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, video) in enumerate(rows.items()):
        for column, frame in enumerate(shown):
            axis = axes[row, column]
            axis.imshow(video[:, frame].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            made = label == predicted and frame >= given
            for spine in axis.spines.values():
                spine.set(color=_MADE if made else _GIVEN, linewidth=2.0 if made else 0.6)
            if row == 0:
                axis.set_title(f"frame {frame}" + (" (given)" if frame < given else ""), size=8)
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", size=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
