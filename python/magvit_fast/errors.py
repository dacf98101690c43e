"""Errors of the package.

Bad arguments raise the built-in ValueError, TypeError or NotImplementedError.
"""

from __future__ import annotations


class MagvitFastError(RuntimeError):
    """Something outside the caller's arguments is wrong: a file, a checkpoint, a missing extra."""


class MissingExtraError(MagvitFastError, ImportError):
    """An optional dependency is needed. The message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: "
            f"run `pip install 'magvit_fast[{extra}]'`"
        )


class FileFormatError(MagvitFastError, ValueError):
    """A file (video, tokens, checkpoint) is unreadable, truncated, foreign or too new."""


class FileWriteError(MagvitFastError, OSError):
    """A file or directory cannot be written: full disk, no permission, a name already taken."""

    @classmethod
    def of(cls, path: object, reason: str) -> FileWriteError:
        return cls(
            f"cannot write {path}: {reason}; free space or choose another place "
            "(nothing was changed)"
        )
