"""``azquant imatrix``: which inputs of a model's matrices matter, measured on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, show_count, visible
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.text import counting_bar, read_text

if TYPE_CHECKING:
    from azquant.imatrix import Imatrix

__all__ = ["imatrix"]


@click.command(
    cls=Verb,
    short_help="Measure which weights of a model matter.",
    epilog="""\b
Examples:
  azquant imatrix az-llm-f32.gguf calibration.txt az-llm.imatrix.gguf
  llama-quantize --imatrix az-llm.imatrix.gguf az-llm-f32.gguf az-llm-q4_0.gguf q4_0
""",
)
@click.argument("model", type=MODEL_FILE)
@store_option
@click.argument("text", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--n-ctx", type=int, help="Tokens of a window.  [default: 512, or what the model has]")
@click.option("--chunks", type=int, help="Take only the first windows.  [default: all]")
@click.option("--threads", type=int, help="Threads to use.  [default: the processors available]")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def imatrix(
    model: Path,
    text: Path,
    dst: Path,
    n_ctx: int | None,
    chunks: int | None,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Let the GGUF MODEL read the file TEXT ("-" is standard input) and write an importance matrix to DST.

    DST is a GGUF file as llama-imatrix writes it: for each matrix of the model's blocks, how large the inputs
    of its columns were. Quantizing with it spends the error where the model uses it least.
    """
    import azquant
    from azquant.evaluate import collect_imatrix
    from azquant.gguf import check_output
    from azquant.imatrix import write_imatrix

    check_output(dst, overwrite=overwrite)  # before the work
    if threads is not None:
        azquant.set_num_threads(threads)
    content = read_text(text)
    with counting_bar("windows", shown=not quiet) as progress:
        found = collect_imatrix(
            model, content, n_ctx=n_ctx, chunks=chunks, dataset=str(text), progress=progress
        )
    sources = [path for path in (model, text) if str(path) != "-"]
    write_imatrix(dst, found, overwrite=overwrite, sources=sources)
    if as_json:
        print_json(_as_dict(dst, found))
    elif not quiet:
        tokens = found.chunk_count * found.chunk_size
        click.echo(
            f"wrote {visible(str(dst))}: {len(found.sums)} matrices, {show_count(tokens)} tokens "
            f"in {found.chunk_count} windows"
        )


def _as_dict(dst: Path, found: Imatrix) -> dict[str, Any]:
    return {
        "destination": str(dst),
        "datasets": list(found.datasets),
        "chunks": found.chunk_count,
        "n_ctx": found.chunk_size,
        "matrices": {
            name: {"columns": len(sums), "rows": int(found.counts[name])} for name, sums in found.sums.items()
        },
    }
