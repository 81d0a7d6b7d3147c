"""What the verbs that read a text share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from azquant.errors import ArgumentError, InputFileError

__all__ = ["counting_bar", "read_text"]


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, or of standard input for "-"; line ends as they are.

    Raises InputFileError when it cannot be read, ArgumentError when it is no UTF-8.
    """
    if str(path) == "-":
        data, name = b"" if sys.stdin is None else sys.stdin.buffer.read(), "standard input"
    else:
        name = str(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name}: the text is not UTF-8 (byte {error.start})") from None


@contextmanager
def counting_bar(what: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr that counts ``what``, and the callback that moves it; ``None`` where nobody watches."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield move
