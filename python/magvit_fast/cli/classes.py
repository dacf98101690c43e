"""Which number a class has: the order of the names that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from magvit_fast.data.clips import list_files
from magvit_fast.data.tokens import INDEX, read_class_names
from magvit_fast.errors import FileFormatError


def class_names(source: str | None, files: Sequence[Path], count: int) -> list[str]:
    """The names of a model's `count` classes, in the order of their numbers.

    source: the folder of the tokens that it was trained on, or the folder of videos that these were
        made from (its folders, sorted, as data.clips numbers them), or a text file with one name a
        line. None takes the folders of `files`, which then have to be all classes.

    Raises:
        ValueError: another number of names than the model has classes, or a file of no such class.
        FileFormatError: a source that cannot be read or names no class.
    """
    names = sorted({file.parent.name for file in files}) if source is None else _stored(source)
    if len(names) != count:
        raise ValueError(
            f"--classes: expected the names of the transformer's {count} classes, got {len(names)} ("
            f"{source or 'the folders of the files'}); give its folder of tokens, the folder of its "
            "training videos, or a text file with one name a line"
        )
    for file in files:
        if file.parent.name not in names:
            raise ValueError(
                f"--classes: {file}: its folder is the name of no class that {source} has"
            )
    return names


def _stored(source: str) -> list[str]:
    path = Path(source)
    if (path / INDEX).is_file():
        names = list(read_class_names(path))
    elif path.is_dir():
        names = sorted({file.parent.name for file in list_files(path)})
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(
                f"{source}: cannot be read as names of classes, one a line ({error})"
            ) from error
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise FileFormatError(f"{source}: names no classes")
    if len(set(names)) != len(names):
        raise FileFormatError(f"{source}: names a class twice")
    return names
