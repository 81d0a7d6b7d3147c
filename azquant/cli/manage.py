"""``azquant create``, ``cp``, ``rm``, ``export``, ``import`` and ``store check``: what changes the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from azquant.cli.console import print_json, print_table, progress_bar, show_bytes, visible, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import chosen_store, store_option
from azquant.cli.models import row_as_dict

if TYPE_CHECKING:
    from azquant.store import ModelRow

__all__ = ["cp", "create", "export", "import_model", "print_done", "rm", "store"]

_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the model of that name.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_done(what: str, row: ModelRow, as_json: bool) -> None:
    """What became of a model."""
    if as_json:
        print_json(row_as_dict(row))
    else:
        write(f"{what} {visible(str(row.name))} ({row.type or 'no GGUF file'}, {show_bytes(row.size)})\n")


@click.command(
    cls=Verb,
    short_help="Put a model into the store.",
    epilog="""\b
Examples:
  azquant create az-llm:v1.0 az-llm-v1.0-q4_0.gguf
  azquant create az-llm:chat -f Modelfile
  azquant create az-llm:v1.0 az-llm-q4_0.gguf --store ollama
""",
)
@click.argument("name")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "-f", "--file", "modelfile", type=click.Path(path_type=Path), help="A Modelfile, instead of FILE."
)
@store_option
@_OVERWRITE
@_JSON
def create(name: str, file: Path | None, modelfile: Path | None, overwrite: bool, as_json: bool) -> None:
    """Put the GGUF FILE, or what a Modelfile describes, into the store as NAME:TAG.

    The file is copied, once however many models share it. Ollama can run the model when its store is chosen.
    """
    if (file is None) == (modelfile is None):
        raise click.UsageError("give either a GGUF FILE or -f Modelfile")
    source = modelfile if file is None else file
    assert source is not None
    with progress_bar(f"reading {visible(source.name)}", shown=not as_json) as progress:
        row = chosen_store().create(
            name, source, modelfile=file is None, overwrite=overwrite, progress=progress
        )
    print_done("created", row, as_json)


@click.command(
    cls=Verb,
    short_help="Give a model a second name.",
    epilog="\b\nExample:\n  azquant cp az-llm:v1.1 az-llm:latest --overwrite",
)
@click.argument("source")
@click.argument("target")
@store_option
@_OVERWRITE
@_JSON
def cp(source: str, target: str, overwrite: bool, as_json: bool) -> None:
    """Give the model SOURCE the name TARGET too. Nothing is copied but the name."""
    print_done("created", chosen_store().cp(source, target, overwrite=overwrite), as_json)


@click.command(
    cls=Verb,
    short_help="Remove models from the store.",
    epilog="\b\nExample:\n  azquant rm az-llm:v1.0",
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@store_option
def rm(names: tuple[str, ...]) -> None:
    """Remove each model NAME:TAG, and the files in the store that no other model needs."""
    store = chosen_store()
    for name in names:
        removed = store.rm(name)
        files = "1 file" if len(removed) == 1 else f"{len(removed)} files"
        write(f"removed {visible(name)} ({files} freed)\n")


@click.command(
    cls=Verb,
    short_help="Write a model into a plain folder.",
    epilog="""\b
Example: carry a model to a machine without a network
  azquant export az-llm:v1.0 /media/stick/az-llm
  azquant import /media/stick/az-llm
""",
)
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@store_option
def export(name: str, folder: Path) -> None:
    """Write the model NAME:TAG into the new FOLDER: files with readable names, a Modelfile and SHA256SUMS."""
    with progress_bar(f"writing {visible(folder.name)}", shown=True) as progress:
        path = chosen_store().export(name, folder, progress=progress)
    write(f"wrote {visible(str(path))}\n")


@click.command(
    "import",
    cls=Verb,
    short_help="Read a model from an exported folder.",
    epilog="\b\nExample:\n  azquant import /media/stick/az-llm az-llm:from-stick",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name", required=False)
@store_option
@_OVERWRITE
@_JSON
def import_model(folder: Path, name: str | None, overwrite: bool, as_json: bool) -> None:
    """Read the model in FOLDER, which `azquant export` wrote, into the store as NAME (default: its own).

    Every byte is compared with its checksum first.
    """
    with progress_bar(f"reading {visible(folder.name)}", shown=not as_json) as progress:
        row = chosen_store().import_(folder, name, overwrite=overwrite, progress=progress)
    print_done("imported", row, as_json)


@click.group(short_help="Look after the store itself.")
def store() -> None:
    """Look after the store itself."""


@store.command(
    cls=Verb,
    short_help="Check every model and file of the store.",
    epilog="\b\nExamples:\n  azquant store check\n  azquant store check --repair",
)
@store_option
@click.option("--repair", is_flag=True, help="Remove what no model needs.")
@click.option("--quick", is_flag=True, help="Do not read the files, only compare their sizes.")
@_JSON
@click.pass_context
def check(ctx: click.Context, repair: bool, quick: bool, as_json: bool) -> None:
    """Check every manifest and blob of the store: missing, cut short, altered, or needed by nothing.

    --repair removes what processes left behind that were ended; never a model, nor a damaged file. Not to
    be used on Ollama's store while Ollama pulls or creates a model. Exit code 2: a model is damaged.
    """
    chosen = chosen_store()
    with progress_bar("checking", shown=not as_json) as progress:
        problems = chosen.check(repair=repair, quick=quick, progress=progress)
    if as_json:
        print_json(
            [
                {
                    "kind": p.kind,
                    "path": str(p.path),
                    "text": p.text,
                    "models": p.models,
                    "repaired": p.repaired,
                }
                for p in problems
            ]
        )
    elif problems:
        rows = [
            [
                p.kind,
                visible(str(p.path)),
                visible(p.text),
                visible(", ".join(p.models)),
                "removed" * p.repaired,
            ]
            for p in problems
        ]
        print_table(("kind", "path", "what", "models", ""), rows)
    else:
        write(f"{visible(str(chosen.root))}: no problems\n")
    if any(not problem.is_debris for problem in problems):
        ctx.exit(2)
