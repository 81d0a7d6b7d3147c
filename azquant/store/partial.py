"""Unfinished downloads: files that one process at a time works on, and that a later one goes on with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from azquant.errors import OutputError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["is_in_use", "open_partial"]


@contextmanager
def open_partial(path: Path) -> Iterator[BinaryIO]:
    """The file at ``path``, made if missing, for reading and writing; nobody else has it meanwhile.

    Raises OutputError when it cannot be made, or another process downloads the same.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666
        )
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "r+b") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"{path}: another process is downloading the same file; wait for it"
                ) from None
        yield file


def is_in_use(path: Path) -> bool:
    """Whether a process has the file open with :func:`open_partial`, or it is no plain file at all."""
    if fcntl is None or not path.is_file() or path.is_symlink():
        return not path.is_file()
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
