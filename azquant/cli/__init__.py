"""The command ``azquant``: one file per verb, which only parses, calls the library and prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import click

from azquant._version import __version__
from azquant.cli import (
    bench,
    chat,
    convert,
    edit,
    eval,
    generate,
    hub,
    imatrix,
    inspect,
    manage,
    models,
    quantize,
    split,
    verify,
)
from azquant.cli.guard import Program

__all__ = ["cli", "main"]


@click.group(
    cls=Program,
    epilog="""\b
Example: from a Hugging Face checkpoint to Azerbaijani text
  azquant convert az_llm_hf az-llm-q4_0.gguf
  azquant inspect az-llm-q4_0.gguf
  azquant generate az-llm-q4_0.gguf "Azərbaycan"

Exit codes: 0 done, 1 a bug of azquant or a closed pipe, 2 a wrong input or option, 130 interrupted.
""",
)
@click.version_option(__version__, prog_name="azquant", message="%(prog)s %(version)s")
def cli() -> None:
    """Checkpoints to 4-bit GGUF files, and the files to text, on the CPU."""


for verb in (
    bench.bench,
    chat.chat,
    convert.convert,
    edit.edit,
    eval.evaluate,
    generate.generate,
    imatrix.imatrix,
    inspect.inspect,
    quantize.quantize,
    split.merge,
    split.split,
    verify.verify,
    manage.create,
    models.list_models,
    models.show,
    models.versions,
    manage.cp,
    manage.rm,
    manage.export,
    manage.import_model,
    manage.store,
    hub.pull,
    hub.push,
):
    cli.add_command(verb)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line ``args`` (default: the program's own) and ends the process."""
    cli.main(args=args, prog_name="azquant")
    raise AssertionError("the command line ends the process itself")
