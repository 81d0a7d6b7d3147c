"""``azquant inspect``: what a GGUF file holds, without running any of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import click

from azquant.cli.console import print_json, print_table, shorten, show_bytes, show_count, visible, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.startup import import_numpy

if TYPE_CHECKING:
    from azquant.gguf import GGUFArray, GGUFFile, Value, ValueType

__all__ = ["inspect"]

_TEXT_LENGTH = 70  # characters of a text that are shown
_NAME_LENGTH = 80
_ITEMS = 4  # items of an array that are shown
_JSON_ITEMS = 64
_ROWS = 5000  # a hostile file may have millions


@click.command(
    cls=Verb,
    short_help="Show what a GGUF file holds.",
    epilog="""\b
Examples:
  azquant inspect az-llm-q4_0.gguf
  azquant inspect az-llm:v1.0 --no-tensors
  azquant inspect az-llm-q4_0.gguf --json --full | jq .types
  azquant inspect az-llm-q4_0.gguf --hash --plot layers.png
""",
)
@click.argument("file", type=MODEL_FILE)
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print everything chosen as JSON.")
@click.option("--metadata/--no-metadata", default=True, show_default=True, help="List the metadata keys.")
@click.option("--tensors/--no-tensors", default=True, show_default=True, help="List the tensors.")
@click.option("--full", is_flag=True, help="Show long texts and arrays whole.")
@click.option("--hash", "hashes", is_flag=True, help="Give the SHA-256 of each tensor's bytes.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the layers: .png, .svg or .pdf.")
@click.option("--overwrite", is_flag=True, help="Replace the picture if it exists.")
def inspect(
    file: Path,
    as_json: bool,
    metadata: bool,
    tensors: bool,
    full: bool,
    hashes: bool,
    plot: Path | None,
    overwrite: bool,
) -> None:
    """Show what the GGUF FILE holds: the model in short, its metadata, its tensors.

    FILE may also be NAME:TAG, a model in the store.

    Only the header is read, so this takes the same moment for any size of model. The first file of a split
    model stands for all.
    """
    import_numpy()
    from azquant.gguf import open_gguf

    with open_gguf(file) as opened:
        sha256 = _hashes(opened) if hashes and tensors else None
        if plot is not None:
            from azquant.evaluate import plot_file

            plot_file(opened, plot, overwrite=overwrite)
        if as_json:
            print_json(_as_dict(opened, metadata, tensors, full, sha256))
            return
        _print_summary(opened)
        if metadata:
            _print_metadata(opened, full)
        if tensors:
            _print_tensors(opened, full, sha256)


def _hashes(file: GGUFFile) -> dict[str, str]:
    from azquant.evaluate import tensor_sha256

    return {name: tensor_sha256(tensor) for name, tensor in file.tensors.items()}


# ---- the model in short ------------------------------------------------------------------------------


def _summary(file: GGUFFile) -> dict[str, Any]:
    """The facts, of Python's own types; ``None`` for what the file does not say."""
    from azquant.gguf import type_totals

    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = type_totals(file.tensors)
    parameters = sum(total["parameters"] for total in types.values())
    tensor_bytes = sum(total["bytes"] for total in types.values())
    return {
        "file": str(file.path),
        "files": [str(path) for path in file.paths],
        "bytes": file.size,
        "version": file.version,
        "byte_order": "little" if file.byte_order == "<" else "big",
        "alignment": file.alignment,
        "data_offset": file.data_offset,
        "has_data": file.has_data,
        "name": _scalar(metadata.get("general.name")),
        "architecture": _scalar(architecture),
        "context_length": _scalar(metadata.get(f"{architecture}.context_length")),
        "vocabulary": _scalar(metadata.get(f"{architecture}.vocab_size"))
        if not _is_array(tokens)
        else len(tokens),
        "parameters": parameters,
        "tensor_bytes": tensor_bytes,
        "bits_per_weight": 8 * tensor_bytes / parameters if parameters else None,
        "types": types,
    }


def _print_summary(file: GGUFFile) -> None:
    facts = _summary(file)
    bits = facts["bits_per_weight"]
    rows = [
        ["file", visible(facts["file"]) + (f" and {others} more" if (others := len(file.paths) - 1) else "")],
        ["size", f"{show_bytes(facts['bytes'])} ({facts['bytes']:,} bytes)"],
        ["format", f"GGUF version {facts['version']}, {facts['byte_order']}-endian"],
        ["model", _plain(facts["name"])],
        ["architecture", _plain(facts["architecture"])],
        ["context length", _plain(facts["context_length"])],
        ["vocabulary", _plain(facts["vocabulary"])],
        ["parameters", f"{show_count(facts['parameters'])} ({facts['parameters']:,})"],
        ["bits per weight", "–" if bits is None else f"{bits:.2f}"],
    ]
    for i, (name, total) in enumerate(facts["types"].items()):
        size = f"{show_count(total['parameters'])} weights, {show_bytes(total['bytes'])}"
        rows.append(["" if i else "tensors", f"{total['tensors']} {name} ({size})"])
    if not facts["has_data"]:
        rows.append(["data", "none: this file is a header only"])
    print_table(("", ""), rows)


def _plain(value: Any) -> str:
    return "–" if value is None else shorten(str(value), _TEXT_LENGTH)


# ---- metadata ----------------------------------------------------------------------------------------


def _print_metadata(file: GGUFFile, full: bool) -> None:
    types = file.metadata_types
    rows = [
        [shorten(key, _NAME_LENGTH), _type_name(types[key], value), _show_value(types[key], value, full)]
        for key, value in _first(file.metadata, full)
    ]
    print_table(("key", "type", "value"), rows, title=f"metadata ({len(file.metadata)} keys)")
    _say_cut(len(file.metadata), full)


def _type_name(kind: ValueType, value: Value) -> str:
    return f"{value.element_type.name.lower()}[]" if _is_array(value) else kind.name.lower()


def _show_value(kind: ValueType, value: Value, full: bool) -> str:
    if _is_array(value):
        return _show_array(value, full)
    if isinstance(value, str):
        return visible(value) if full else shorten(value, _TEXT_LENGTH)
    if isinstance(value, float):
        return f"{value:.7g}" if kind.name == "FLOAT32" else repr(value)
    return str(value)


def _show_array(array: GGUFArray, full: bool) -> str:
    """``[32000 strings] "a", "b", …``"""
    count = len(array)
    kind = array.element_type
    items = array[:] if full else array[: _ITEMS + 1]
    nested = [_show_array(item, full) if _is_array(item) else _show_item(kind, item, full) for item in items]
    if not full and count > _ITEMS + 1:
        nested = [*nested[:_ITEMS], "…"]
    noun = kind.name.lower() + ("" if count == 1 else "s")
    return f"[{count} {noun}] {', '.join(nested)}".rstrip()


def _show_item(kind: ValueType, item: Any, full: bool) -> str:
    if isinstance(item, str):
        return f'"{visible(item) if full else shorten(item, 24)}"'
    return _show_value(kind, item, full)


# ---- tensors -----------------------------------------------------------------------------------------


def _print_tensors(file: GGUFFile, full: bool, sha256: Mapping[str, str] | None) -> None:
    rows = [
        [
            shorten(name, _NAME_LENGTH),
            " x ".join(map(str, tensor.shape)) or "scalar",
            tensor.type.name,
            f"{tensor.nbytes:,}",
            f"{tensor.offset:,}",
            *([] if sha256 is None else [sha256[name]]),
        ]
        for name, tensor in _first(file.tensors, full)
    ]
    head = ("name", "shape", "type", "bytes", "offset", *(() if sha256 is None else ("sha256",)))
    print_table(head, rows, right=(3, 4), title=f"tensors ({len(file.tensors)})")
    _say_cut(len(file.tensors), full)


def _first(entries: Mapping[str, Any], full: bool) -> list[tuple[str, Any]]:
    names = list(entries)
    return [(name, entries[name]) for name in (names if full else names[:_ROWS])]


def _say_cut(count: int, full: bool) -> None:
    if not full and count > _ROWS:
        write(f"… and {count - _ROWS:,} more; --full shows them all\n\n")


# ---- JSON --------------------------------------------------------------------------------------------


def _as_dict(
    file: GGUFFile, metadata: bool, tensors: bool, full: bool, sha256: Mapping[str, str] | None
) -> dict[str, Any]:
    result = _summary(file)
    if metadata:
        types = file.metadata_types
        result["metadata"] = {
            key: _json_value(types[key], value, full) for key, value in file.metadata.items()
        }
    if tensors:
        result["tensors"] = [
            {
                "name": name,
                "shape": list(tensor.shape),
                "type": tensor.type.name,
                "bytes": tensor.nbytes,
                "offset": tensor.offset,
                **({} if sha256 is None else {"sha256": sha256[name]}),
            }
            for name, tensor in file.tensors.items()
        ]
    return result


def _json_value(kind: ValueType, value: Value, full: bool) -> dict[str, Any]:
    if not _is_array(value):
        return {"type": kind.name.lower(), "value": value}
    items: Sequence[Any] = value[:] if full else value[:_JSON_ITEMS]
    return {
        "type": "array",
        "element_type": value.element_type.name.lower(),
        "count": len(value),
        "complete": len(items) == len(value),
        "value": [_json_value(value.element_type, item, full) if _is_array(item) else item for item in items],
    }


def _scalar(value: Any) -> Any:
    return None if _is_array(value) else value


def _is_array(value: Any) -> TypeGuard[GGUFArray]:
    from azquant.gguf import GGUFArray

    return isinstance(value, GGUFArray)
