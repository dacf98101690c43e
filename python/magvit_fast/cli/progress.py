"""A progress bar with rate and time left, on stderr, where somebody is looking."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(
    description: str, total: int | None, unit: str, *, still: bool = False
) -> Iterator[Advance]:
    """Yield `advance(n)`, which moves the bar by n of `total` units (None: unknown length).

    The bar is drawn by rich if that is installed and stderr is a terminal; otherwise nothing is.
    still: it is drawn when it moves and not in between, beside what is being timed.
    """
    bar = _bar(unit, still) if sys.stderr.isatty() else None
    if bar is None:
        yield lambda count: None
        return
    with bar:
        task = bar.add_task(description, total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)
            if still:
                bar.refresh()

        yield advance


def _bar(unit: str, still: bool) -> Any:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text
    except ImportError:  # a bar is a courtesy, not worth an error
        return None

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} {unit}/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=not still,
    )
