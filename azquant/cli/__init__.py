"""The command ``azquant``: one file per verb, which only parses, calls the library and prints."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import NoReturn, cast

import click

from azquant._version import __version__
from azquant.cli.guard import Program

__all__ = ["cli", "main"]

# Each verb's module, and its name there. A module is imported when its verb is called, or listed.
_VERBS = {
    "bench": ("bench", "bench"),
    "chat": ("chat", "chat"),
    "convert": ("convert", "convert"),
    "cp": ("manage", "cp"),
    "create": ("manage", "create"),
    "edit": ("edit", "edit"),
    "eval": ("eval", "evaluate"),
    "export": ("manage", "export"),
    "generate": ("generate", "generate"),
    "imatrix": ("imatrix", "imatrix"),
    "import": ("manage", "import_model"),
    "inspect": ("inspect", "inspect"),
    "list": ("models", "list_models"),
    "merge": ("split", "merge"),
    "pull": ("hub", "pull"),
    "push": ("hub", "push"),
    "quantize": ("quantize", "quantize"),
    "rm": ("manage", "rm"),
    "show": ("models", "show"),
    "split": ("split", "split"),
    "store": ("manage", "store"),
    "verify": ("verify", "verify"),
    "versions": ("models", "versions"),
}

# Commands make many objects that live to their end and hardly a cycle; looking through all of them for
# cycles, over and again, took them up to a twentieth of their time.
_UNCOLLECTED = 200_000


class _Verbs(Mapping[str, click.Command]):
    def __getitem__(self, name: str) -> click.Command:
        module, attribute = _VERBS[name]
        found: click.Command = getattr(importlib.import_module(f"azquant.cli.{module}"), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_VERBS)

    def __len__(self) -> int:
        return len(_VERBS)


@click.group(
    cls=Program,
    commands=cast(MutableMapping[str, click.Command], _Verbs()),  # click writes to it in add_command only
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


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line ``args`` (default: the program's own) and ends the process."""
    gc.set_threshold(_UNCOLLECTED)
    cli.main(args=args, prog_name="azquant")
    raise AssertionError("the command line ends the process itself")
