"""``azquant split`` and ``azquant merge``: one GGUF file as several, and several as one."""

from __future__ import annotations

from pathlib import Path

import click

from azquant.cli.console import progress_bar, show_bytes, visible
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.options import size_option

__all__ = ["merge", "split"]


@click.command(
    cls=Verb,
    short_help="Cut a GGUF file into several.",
    epilog="""\b
Examples:
  azquant split model.gguf model --max-size 2G
  azquant split model.gguf parts/model --max-tensors 64
""",
)
@click.argument("file", type=MODEL_FILE)
@store_option
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option(
    "--max-size", callback=size_option, metavar="SIZE", help="Bytes of tensors in each file: 500M, 2G."
)
@click.option("--max-tensors", type=click.IntRange(min=1), help="Tensors in each file [default: 128].")
@click.option("--metadata-first", is_flag=True, help="The first file holds the metadata only.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def split(
    file: Path,
    prefix: Path,
    max_size: int | None,
    max_tensors: int | None,
    metadata_first: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Cut the GGUF FILE into PREFIX-00001-of-0000N.gguf and so on, which llama.cpp loads by the first.

    All of them are written and verified before the first appears.
    """
    from azquant.gguf import split_gguf

    with progress_bar(f"splitting {visible(file.name)}", shown=not quiet) as progress:
        shards = split_gguf(
            file,
            prefix,
            max_tensors=max_tensors,
            max_bytes=max_size,
            metadata_first=metadata_first,
            overwrite=overwrite,
            progress=progress,
        )
    if not quiet:
        for path in shards:
            click.echo(f"wrote {visible(str(path))} ({show_bytes(path.stat().st_size)})")


@click.command(
    cls=Verb,
    short_help="Make one GGUF file of a split model.",
    epilog="""\b
Example:
  azquant merge model-00001-of-00003.gguf model.gguf
""",
)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def merge(first: Path, dst: Path, overwrite: bool, quiet: bool) -> None:
    """Write the split model whose FIRST file is given as one file DST. The others lie beside it."""
    from azquant.gguf import merge_gguf

    with progress_bar(f"merging into {visible(dst.name)}", shown=not quiet) as progress:
        merge_gguf(first, dst, overwrite=overwrite, progress=progress)
    if not quiet:
        click.echo(f"wrote {visible(str(dst))} ({show_bytes(dst.stat().st_size)})")
