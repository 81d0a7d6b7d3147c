"""``azquant pull`` and ``push``: models from and to the Hugging Face Hub."""

from __future__ import annotations

import click

from azquant.cli.console import progress_bar, visible, write
from azquant.cli.guard import Verb
from azquant.cli.manage import print_done
from azquant.cli.model_file import chosen_store, store_option

__all__ = ["pull", "push"]

_ENDPOINT = click.option(
    "--endpoint", metavar="URL", help="Another Hub.  [default: HF_ENDPOINT or https://huggingface.co]"
)


@click.command(
    cls=Verb,
    short_help="Download a model from the Hub.",
    epilog="""\b
Examples:
  azquant pull hf:ORG/REPO:q4_0
  azquant pull hf:ORG/REPO:az-llm-q4_0.gguf@v1.0 az-llm:v1.0
""",
)
@click.argument("source")
@click.argument("name", required=False)
@store_option
@_ENDPOINT
@click.option("--overwrite", is_flag=True, help="Replace the model of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(source: str, name: str | None, endpoint: str | None, overwrite: bool, as_json: bool) -> None:
    """Download SOURCE, hf:ORG/REPO[:FILE or quant][@revision], into the store as NAME.

    Without NAME it is hf.co/ORG/REPO:<quant>, as Ollama would call it. Pull again after an interruption,
    and it goes on where it stopped. Checksums are compared. The login is huggingface_hub's: `hf auth
    login`.
    """
    with progress_bar(f"pulling {visible(source)}", shown=not as_json) as progress:
        row = chosen_store().pull(source, name, endpoint=endpoint, overwrite=overwrite, progress=progress)
    print_done("pulled", row, as_json)


@click.command(
    cls=Verb,
    short_help="Upload a model to the Hub.",
    epilog="\b\nExample:\n  azquant push az-llm:v1.0 hf:ORG/REPO --create --private",
)
@click.argument("name")
@click.argument("target")
@store_option
@_ENDPOINT
@click.option("--create", is_flag=True, help="Make the repository if it is not there.")
@click.option("--private", is_flag=True, help="With --create: for you alone.")
def push(name: str, target: str, endpoint: str | None, create: bool, private: bool) -> None:
    """Upload the model NAME:TAG to TARGET, hf:ORG/REPO[:FILE][@revision], in one commit.

    Its template, system text and parameters go with it, as files where Ollama looks for them.
    """
    url = chosen_store().push(name, target, endpoint=endpoint, create=create, private=private)
    write(f"pushed {visible(name)}: {visible(url)}\n")
