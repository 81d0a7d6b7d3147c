"""How the program ends: one line for each error and warning, and an exit code that says which kind it was."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

import click

from azquant.cli.console import drop_output, say, write
from azquant.errors import AzquantError, AzquantWarning, InternalError

__all__ = ["BUG", "INTERRUPTED", "WRONG_INPUT", "Program", "Verb"]

BUG = 1
WRONG_INPUT = 2
INTERRUPTED = 130


# Met only while help and the like are printed: what azquant writes itself raises OutputError.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class _Interrupted(Exception):
    """Ctrl-C while a verb ran, out of click's own hands."""


@dataclass
class _State:
    debug: bool = False


def _debug_option() -> click.Option:
    def switch_on(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(_State).debug = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=switch_on,
        help="Show the Python traceback of an error.",
    )


class Verb(click.Command):
    """A command that also takes --debug, so that it may stand before or after the verb."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class Program(click.Group):
    """The group of all verbs; the one place where exceptions become messages and exit codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line of its own
            raise _Interrupted from None

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and ends the process."""
        state = _State()
        kwargs.update(standalone_mode=False, obj=state)
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):  # a terminal that cannot show ə shows \u0259
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        with _one_line_warnings():
            code = _exit_code(lambda: super(Program, self).main(*args, **kwargs), state)
        sys.exit(code)


def _exit_code(run: Callable[[], Any], state: _State) -> int:
    try:
        code = run()
        write("")  # what click printed itself may still be on its way
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        _explain(error)
        return error.exit_code
    except (_Interrupted, click.Abort):
        say("interrupted", "", new_line=True)
        return INTERRUPTED
    except BrokenPipeError:  # `azquant inspect model.gguf | head` is no error to speak of
        return BUG
    except InternalError as error:
        _show_traceback(state)
        say("error", f"{error}. This is a bug of azquant: run again with --debug and please report it")
        return BUG
    except AzquantError as error:
        _show_traceback(state)
        say("error", str(error))
        return WRONG_INPUT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            drop_output()
            say("error", f"cannot write: {error.strerror}")
            return WRONG_INPUT
        _show_traceback(state)
        kind = type(error).__name__
        hint = "" if state.debug else "run again with --debug and "
        say("error", f"unexpected {kind}: {error}. This is a bug of azquant: {hint}please report it")
        return BUG


def _explain(error: click.ClickException) -> None:
    """A wrong option or argument: what is wrong, and where the right ones are listed."""
    message = error.format_message()
    if message.startswith("Usage:"):  # no verb was given: the help is the message
        click.echo(message, err=True)
        return
    message = " ".join(message.split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message = f"{message.rstrip('.')}. Try '{error.ctx.command_path} --help'."
    say("error", message)


def _show_traceback(state: _State) -> None:
    if state.debug:
        import traceback

        say(None, traceback.format_exc())


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Each warning once, as one line of the program rather than of the source code."""
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if text not in said:
            said.add(text)
            say("warning", text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", AzquantWarning)
        warnings.showwarning = show
        yield
