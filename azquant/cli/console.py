"""What the verbs print with: safe text, sizes in words, tables, JSON, a progress bar.

Text that comes from a file never reaches the terminal as it is: control characters, escape sequences,
invisible and direction-changing characters are shown as escapes (``\\x1b``), and none of it is read as
markup.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from azquant.errors import OutputError

__all__ = [
    "dim",
    "drop_output",
    "for_terminal",
    "print_json",
    "print_table",
    "progress_bar",
    "say",
    "shorten",
    "show_bytes",
    "show_count",
    "visible",
    "write",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What json.dumps leaves in a string though a terminal may act on it.
_JSON_UNSAFE = re.compile(r"[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    """``text`` with each character that is not printable (but those in ``keep``) as a Python escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def for_terminal(text: str) -> str:
    """Generated text as it is, but with control characters other than newline and tab as escapes."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shorten(text: str, length: int) -> str:
    """The beginning of ``text``, made visible; says how long it is where it was cut."""
    if len(text) <= length:
        return visible(text)
    return f"{visible(text[:length])}… ({len(text):,} characters)"


def show_bytes(n: int) -> str:
    """A size in decimal units, as shops and Hugging Face count: ``"4.51 MB"``."""
    size, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{n} B" if unit == "B" else f"{size:.3g} {unit}" if size < 99.95 else f"{size:.0f} {unit}"


def show_count(n: int) -> str:
    """A number of weights: ``"5.85 M"``."""
    size, unit = float(n), ""
    for larger in ("k", "M", "G", "T"):
        if size < 999.5:
            break
        size, unit = size / 1000, f" {larger}"
    return f"{n}" if not unit else f"{size:.3g}{unit}" if size < 99.95 else f"{size:.0f}{unit}"


def dim(text: str) -> str:
    """``text`` in the terminal's faint style; click drops the style where there is no terminal."""
    return click.style(text, dim=True)


def say(kind: str | None, text: str, *, new_line: bool = False) -> None:
    """One line on stderr: ``azquant: kind: text``. With ``kind`` None the lines of ``text`` as they are.

    ``new_line`` starts a line of its own on a terminal, where ^C or an unfinished line may stand.
    """
    line = visible(text.rstrip("\n"), keep="" if kind else "\n")
    if kind:
        line = f"azquant: {kind}: {line}" if line else f"azquant: {kind}"
    if new_line and sys.stderr is not None and sys.stderr.isatty():
        line = "\n" + line
    try:
        click.echo(line, err=True)
    except OSError:  # nobody listens
        return


def write(text: str) -> None:
    """``text`` on stdout, at once.

    Raises OutputError when it cannot be written, BrokenPipeError when nobody reads it.
    """
    try:
        click.echo(text, nl=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def drop_output() -> None:
    """Sends what is still buffered for stdout nowhere; Python would complain about it again when it exits."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), title: str = ""
) -> None:
    """A table on stdout; ``right`` are the columns aligned to the right. Cells must be visible() already.

    As wide as the terminal, its long cells folded; in a file or pipe as wide as it needs, a line a row.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    drawn = io.StringIO()
    width = None if on_terminal else 100_000
    console = Console(
        file=drawn, force_terminal=on_terminal, width=width, highlight=False, markup=False, emoji=False
    )
    table = Table(box=box.SIMPLE_HEAD if any(head) else None, pad_edge=False, show_header=any(head))
    for i, name in enumerate(head):
        table.add_column(
            Text(name), justify="right" if i in right else "left", overflow="fold", no_wrap=i in right
        )
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    console.print(table)
    lines = [line.rstrip() for line in drawn.getvalue().strip("\n").split("\n")]
    heading = click.style(title, bold=True) + "\n" if title else ""
    write(heading + "\n".join(line for line in lines if line) + "\n\n")


def print_json(value: Any) -> None:
    """``value`` as JSON on stdout, with letters as they are but nothing in it that a terminal would obey.

    Numbers that JSON does not have become the strings "NaN", "Infinity" and "-Infinity".
    """
    text = json.dumps(_json_numbers(value), ensure_ascii=False, indent=2, allow_nan=False)
    write(_JSON_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def _json_numbers(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_numbers(item) for item in value]
    return value


@contextmanager
def progress_bar(what: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr and the callback that moves it (done, total); ``None`` where nobody watches."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield move
