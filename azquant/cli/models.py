"""``azquant list``, ``show`` and ``versions``: what the store holds."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, print_table, say, shorten, show_bytes, show_count, visible, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import chosen_store, store_option

if TYPE_CHECKING:
    from azquant.store import Change, Comparison, ModelInfo, ModelRow

__all__ = ["list_models", "row_as_dict", "show", "versions"]

_TEXT_LENGTH = 70
_HEAD = ("name", "id", "model", "type", "size", "bits/weight", "modified")


@click.command(
    "list",
    cls=Verb,
    short_help="List the models in the store.",
    epilog="""\b
Examples:
  azquant list
  azquant list --store ollama
  azquant list az-llm --json
""",
)
@click.argument("name", required=False)
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_models(name: str | None, as_json: bool) -> None:
    """List the models in the store, or those whose name begins with NAME."""
    store = chosen_store()
    rows = [row for row in store.list() if str(row.name).lower().startswith((name or "").lower())]
    if as_json:
        print_json([row_as_dict(row) for row in rows])
        return
    if not rows:
        say("note", f"there are no models in {store.root}; `azquant create NAME:TAG FILE.gguf` adds one")
        return
    print_table(_HEAD, [_cells(row) for row in rows], right=(4, 5))
    _say_problems(rows)


def _cells(row: ModelRow) -> list[str]:
    bits = "–" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
    count = "" if row.parameters is None else f" {show_count(row.parameters)}"
    return [
        visible(str(row.name)),
        row.digest[7:19] or "–",
        visible(row.architecture or "–") + count,
        row.type or "–",
        show_bytes(row.size),
        bits,
        _when(row.modified),
    ]


def _when(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _say_problems(rows: Iterable[ModelRow]) -> None:
    for row in rows:
        if row.problem:
            say("warning", f"{row.name}: {row.problem}")


def row_as_dict(row: ModelRow) -> dict[str, Any]:
    """A line of the list for ``--json``."""
    return {
        "name": str(row.name),
        "digest": row.digest,
        "architecture": row.architecture,
        "type": row.type,
        "parameters": row.parameters,
        "size": row.size,
        "bits_per_weight": row.bits_per_weight,
        "modified": row.modified.isoformat(),
        "problem": row.problem,
    }


# ---- show --------------------------------------------------------------------------------------------


@click.command(
    cls=Verb,
    short_help="Show what a model in the store is made of.",
    epilog="""\b
Examples:
  azquant show az-llm:v1.0
  azquant show az-llm:v1.0 --modelfile > Modelfile
""",
)
@click.argument("name")
@store_option
@click.option("--modelfile", is_flag=True, help="Print a Modelfile that makes the same model again.")
@click.option("--template", is_flag=True, help="Print the template alone.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(name: str, modelfile: bool, template: bool, as_json: bool) -> None:
    """Show the model NAME:TAG: its metadata, parameters, template and where it comes from.

    `azquant inspect NAME:TAG` shows its GGUF file, tensor by tensor.
    """
    info = chosen_store().show(name)
    if modelfile:
        write(str(info.modelfile))
    elif template:
        write((info.template or "") + "\n")
    elif as_json:
        print_json(_info_as_dict(info))
    else:
        _print_info(info)


def _print_info(info: ModelInfo) -> None:
    row = info.row
    rows = [
        ["name", visible(str(row.name))],
        ["id", row.digest[7:19]],
        ["file", "–" if info.path is None else visible(str(info.path))],
        ["architecture", visible(row.architecture or "–")],
        ["size", f"{show_bytes(row.size)} ({row.size:,} bytes)"],
        [
            "parameters",
            "–" if row.parameters is None else f"{show_count(row.parameters)} ({row.parameters:,})",
        ],
        ["bits per weight", "–" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"],
        ["modified", _when(row.modified)],
    ]
    rows += [
        ["" if i else "tensors", f"{total['tensors']} {kind} ({show_bytes(total['bytes'])})"]
        for i, (kind, total) in enumerate(info.types.items())
    ]
    print_table(("", ""), rows, title="model")
    settings = [
        [key, shorten(str(item), _TEXT_LENGTH)]
        for key, value in info.parameters.items()
        for item in (value if isinstance(value, list) else [value])
    ]
    texts = [("template", info.template), ("system", info.system)]
    texts += [("license", text) for text in info.licenses]
    texts += [(message.role, message.content) for message in info.messages]
    settings += [[key, shorten(text, _TEXT_LENGTH)] for key, text in texts if text is not None]
    if settings:
        print_table(("", ""), settings, title="run with")
    origin = [[visible(key), shorten(str(value), _TEXT_LENGTH)] for key, value in info.provenance.items()]
    if source := info.config.get("source"):
        origin.append(["pulled from", shorten(str(source), _TEXT_LENGTH)])
    if origin:
        print_table(("", ""), origin, title="comes from")
    keys = [[visible(key), shorten(str(value), _TEXT_LENGTH)] for key, value in info.metadata.items()]
    print_table(("key", "value"), keys, title="metadata")


def _info_as_dict(info: ModelInfo) -> dict[str, Any]:
    return {
        **row_as_dict(info.row),
        "path": None if info.path is None else str(info.path),
        "layers": [layer.as_dict() for layer in info.layers],
        "config": info.config,
        "run_with": info.parameters,
        "template": info.template,
        "system": info.system,
        "licenses": list(info.licenses),
        "messages": [{"role": m.role, "content": m.content} for m in info.messages],
        "types": info.types,
        "metadata": info.metadata,
        "provenance": info.provenance,
        "modelfile": str(info.modelfile),
    }


# ---- versions ----------------------------------------------------------------------------------------


@click.command(
    cls=Verb,
    short_help="List the versions of a model, or what changed between two.",
    epilog="""\b
Examples:
  azquant versions az-llm
  azquant versions az-llm v1.0 v1.1
""",
)
@click.argument("name")
@click.argument("before", required=False)
@click.argument("after", required=False)
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def versions(name: str, before: str | None, after: str | None, as_json: bool) -> None:
    """List the versions (tags) of the model NAME, oldest first, and what changed from each to the next.

    With the tags BEFORE and AFTER: what changed between these two, tensor by tensor and key by key.
    """
    store = chosen_store()
    base = name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name
    if before is not None:
        old, new = (tag if ":" in tag else f"{base}:{tag}" for tag in (before, after or "latest"))
        found = store.compare(old, new)
        if as_json:
            print_json(_comparison_as_dict(found))
        else:
            _print_comparison(found)
        return
    rows = store.versions(name)
    steps = [
        store.compare(str(one.name), str(other.name))
        if one.problem is None and other.problem is None
        else None
        for one, other in pairwise(rows)
    ]
    if as_json:
        changes = [None, *(step and _comparison_as_dict(step) for step in steps)]
        pairs = zip(rows, changes, strict=True)
        print_json([{**row_as_dict(row), "changes": change} for row, change in pairs])
        return
    notes = ["", *("" if step is None else _in_short(step) for step in steps)]
    cells = [[*_cells(row), note] for row, note in zip(rows, notes, strict=True)]
    print_table((*_HEAD, "changed"), cells, right=(4, 5))
    _say_problems(rows)


def _in_short(found: Comparison) -> str:
    if found.is_same:
        return "nothing"
    counts = [
        (len(found.tensors), "tensor", "tensors"),
        (len(found.metadata), "key", "keys"),
        (len(found.settings), "setting", "settings"),
    ]
    return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts if count)


def _print_comparison(found: Comparison) -> None:
    one, other = found.before.row, found.after.row
    head = ("", visible(str(one.name)), visible(str(other.name)))
    rows = [
        [label, _cells(one)[column], _cells(other)[column]]
        for label, column in (
            ("id", 1),
            ("model", 2),
            ("type", 3),
            ("size", 4),
            ("bits/weight", 5),
            ("modified", 6),
        )
    ]
    print_table(head, rows)
    if found.is_same:
        write("nothing else differs\n")
        return
    changed = [[visible(change.name), _side(change.before), _side(change.after)] for change in found.tensors]
    title = f"tensors ({len(found.tensors)} changed, {found.same_tensors} the same)"
    if changed:
        print_table(head, changed, title=title)
    for title, changes in (("metadata", found.metadata), ("run with", found.settings)):
        if changes:
            print_table(
                head, [[visible(c.name), _side(c.before), _side(c.after)] for c in changes], title=title
            )


def _side(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and "shape" in value:
        shape = " x ".join(map(str, value["shape"])) or "scalar"
        return f"{value['type']} {shape} {value['sha256'][:12]}"
    if isinstance(value, dict):
        return f"{value['items']} items {value['sha256'][:12]}"
    return shorten(str(value), _TEXT_LENGTH)


def _comparison_as_dict(found: Comparison) -> dict[str, Any]:
    def changes(all_of: Iterable[Change]) -> list[dict[str, Any]]:
        return [{"name": c.name, "before": c.before, "after": c.after} for c in all_of]

    return {
        "before": row_as_dict(found.before.row),
        "after": row_as_dict(found.after.row),
        "tensors": changes(found.tensors),
        "same_tensors": found.same_tensors,
        "metadata": changes(found.metadata),
        "settings": changes(found.settings),
    }
