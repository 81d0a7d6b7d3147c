"""An argument that is a file or NAME:TAG of a model in the store; the option that says which store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from azquant.errors import ArgumentError

if TYPE_CHECKING:
    from azquant.store import Store

__all__ = ["MODEL_FILE", "check_in_place", "chosen_store", "store_option"]

_KEY = "azquant.store"
_Command = TypeVar("_Command", bound=Callable[..., Any])


class _ModelFile(click.ParamType[Path]):
    """Gives the path of a file: the one named, or that of a model in the store."""

    name = "FILE or NAME:TAG"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises what :func:`azquant.store.resolve` raises."""
        with suppress(OSError, ValueError):
            path = Path(value)
            if path.exists():
                return path  # as resolve() would say, without what a store needs
        from azquant.store import resolve

        return resolve(value, None if ctx is None else ctx.meta.get(_KEY))


MODEL_FILE = _ModelFile()


def store_option(command: _Command) -> _Command:
    """``--store``, for :func:`chosen_store` and MODEL_FILE."""

    def remember(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.meta[_KEY] = value

    return click.option(
        "--store",
        is_eager=True,
        expose_value=False,
        callback=remember,
        metavar="FOLDER",
        help="Where models are kept; 'ollama': Ollama's own.  [default: AZQUANT_MODELS or your data folder]",
    )(command)


def chosen_store() -> Store:
    """The store that the command line chose."""
    from azquant.store import Store

    return Store(click.get_current_context().meta.get(_KEY))


def check_in_place(file: Path) -> None:
    """Raises ArgumentError for a file of a store, which is named by what it holds and may not be changed."""
    from azquant.store.manifest import is_digest

    if is_digest(file.resolve().name):
        raise ArgumentError(
            f"{file} belongs to a store of models, where files are never changed; "
            "name a new file, and `azquant create` another tag from it"
        )
