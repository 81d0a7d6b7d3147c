"""``azquant edit``: other metadata in a GGUF file, the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, print_table, progress_bar, shorten, visible
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, check_in_place, store_option
from azquant.errors import ArgumentError, InputFileError

if TYPE_CHECKING:
    from azquant.gguf import GGUFFile, MetadataValue, ValueType

__all__ = ["edit"]

_LENGTH = 60
_SHORT = {
    "u8": "uint8",
    "i8": "int8",
    "u16": "uint16",
    "i16": "int16",
    "u32": "uint32",
    "i32": "int32",
    "u64": "uint64",
    "i64": "int64",
    "f32": "float32",
    "f64": "float64",
}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@click.command(
    cls=Verb,
    short_help="Set and remove metadata of a GGUF file.",
    epilog="""\b
Examples:
  azquant edit model.gguf --set general.name "Azərbaycan LLM"
  azquant edit model.gguf new.gguf --set-file tokenizer.chat_template chat.jinja
  azquant edit model.gguf --add my.ids i32[] "[1, 2, 3]" --remove general.url --dry-run
""",
)
@click.argument("file", type=MODEL_FILE)
@store_option
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@click.option(
    "--set", "set_", nargs=2, multiple=True, metavar="KEY VALUE", help="Change a key, not its type."
)
@click.option("--set-file", nargs=2, multiple=True, metavar="KEY PATH", help="The same, with a file's text.")
@click.option("--add", nargs=3, multiple=True, metavar="KEY TYPE VALUE", help="Add a key.")
@click.option("--remove", multiple=True, metavar="KEY", help="Leave a key out.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option("--dry-run", is_flag=True, help="Show what would change; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as JSON.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def edit(
    file: Path,
    dst: Path | None,
    set_: tuple[tuple[str, str], ...],
    set_file: tuple[tuple[str, str], ...],
    add: tuple[tuple[str, str, str], ...],
    remove: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Set and remove metadata of the GGUF FILE, written to DST or, without one, in its place.

    Tensors are copied bit by bit. FILE is replaced in one step, after the new one is complete and verified;
    there must be room for both. Values of arrays are JSON lists. TYPE is u8 to u64, i8 to i64, f32, f64,
    bool or string, with [] for arrays of them.
    """
    from azquant.gguf import edit_gguf, edited_metadata, open_gguf

    if not (set_ or set_file or add or remove):
        raise click.UsageError("nothing to change: give --set, --set-file, --add or --remove")
    if dst is None:
        check_in_place(file)
    with open_gguf(file, join=False) as opened:
        texts = [*set_, *((key, _read(Path(path))) for key, path in set_file)]
        values = _values(opened, texts, add, remove)
        changes = _changes(opened, edited_metadata(opened, values, remove))
    if not dry_run:
        with progress_bar(f"writing {visible((dst or file).name)}", shown=not quiet) as progress:
            edit_gguf(file, dst, values=values, remove=remove, overwrite=overwrite, progress=progress)
    target = str(dst or file)
    if as_json:
        print_json({"file": str(file), "destination": target, "dry_run": dry_run, "changes": changes})
    elif not quiet:
        rows = [
            [shorten(change["key"], _LENGTH), change["type"], _show(change["before"]), _show(change["after"])]
            for change in changes
        ]
        print_table(("key", "type", "before", "after"), rows)
        click.echo(f"dry run: {visible(target)} was not written" if dry_run else f"wrote {visible(target)}")


def _values(
    file: GGUFFile,
    texts: list[tuple[str, str]],
    add: tuple[tuple[str, str, str], ...],
    remove: tuple[str, ...],
) -> dict[str, Any]:
    """What the options ask for, in Python's types or as typed values."""
    from azquant.gguf import GGUFArray, MetadataValue

    types = file.metadata_types
    given = [*(key for key, _ in texts), *(key for key, _, _ in add)]
    for key in given:
        if given.count(key) > 1:
            raise ArgumentError(f"key {key!r} is given a value twice")
    values: dict[str, Any] = {}
    for key, text in texts:
        if key not in types or key in remove:
            values[key] = text  # the library says what is wrong with it, and suggests another key
            continue
        old = file.metadata[key]
        element = old.element_type if isinstance(old, GGUFArray) else None
        values[key] = _parse(key, text, types[key], element)
    for key, type_, text in add:
        if key in types and key not in remove:
            raise ArgumentError(f"{file.path} has a key {key!r} already: use --set, or --remove it too")
        kind, element = _type(type_)
        try:
            values[key] = MetadataValue(kind, _parse(key, text, kind, element), element)
        except ArgumentError as error:
            message = str(error)
            raise ArgumentError(message if repr(key) in message else f"key {key!r}: {message}") from None
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputFileError(f"{path} cannot be read: {reason}") from error


def _type(word: str) -> tuple[ValueType, ValueType | None]:
    from azquant.gguf import ValueType

    name = word.lower().removesuffix("[]")
    name = _SHORT.get(name, name).upper()
    if name not in ValueType.__members__ or name == "ARRAY":
        known = ", ".join([*_SHORT, "bool", "string"])
        raise ArgumentError(f"{word!r} is no type of metadata; known are {known}, with [] for arrays")
    kind = ValueType[name]
    return (ValueType.ARRAY, kind) if word.endswith("[]") else (kind, None)


def _parse(key: str, text: str, kind: ValueType, element: ValueType | None) -> Any:
    """``text`` as Python's value of ``kind``; whether it fits is seen when it is packed."""
    if kind.name == "STRING":
        return text
    try:
        if element is not None:
            items = json.loads(text)
            if not isinstance(items, list):
                raise ValueError("no list")
            return items
        if kind.name == "BOOL":
            return _BOOLS[text.lower()]
        return float(text) if kind.name.startswith("FLOAT") else int(text, 0)
    except (ValueError, KeyError, RecursionError):
        what = "JSON list" if element is not None else kind.name.lower()
        raise ArgumentError(f"key {key!r}: {text[:60]!r} is no {what}") from None


def _changes(file: GGUFFile, edited: dict[str, MetadataValue]) -> list[dict[str, Any]]:
    """Each key that changes: its type, its value before and after (``None`` where there is none)."""
    before = file.copy_metadata()
    changes = []
    for key in dict.fromkeys((*before, *edited)):
        old, new = before.get(key), edited.get(key)
        shown = old if new is None else new
        if old != new and shown is not None:
            element = shown.element_type
            type_ = shown.type.name.lower() if element is None else f"{element.name.lower()}[]"
            changes.append({"key": key, "type": type_, "before": _plain(old), "after": _plain(new)})
    return changes


def _plain(value: MetadataValue | None) -> Any:
    if value is None:
        return None
    if value.element_type is None:
        return value.value
    return [item if isinstance(item, (str, int, float)) else repr(item) for item in value.value[:64]]


def _show(value: Any) -> str:
    return "–" if value is None else shorten(value if isinstance(value, str) else json.dumps(value), _LENGTH)
