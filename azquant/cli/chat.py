"""``azquant chat``: a conversation with a GGUF model, by its own chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from azquant.cli.answering import answer_options, load_model, model_options, sampling_options
from azquant.cli.console import dim, for_terminal, say, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.startup import import_numpy
from azquant.errors import ArgumentError, ContextLengthError

__all__ = ["chat"]


@click.command(
    cls=Verb,
    short_help="Talk to a GGUF model.",
    epilog="""\b
Examples:
  azquant chat az-chat-q4_0.gguf
  azquant chat az-chat:v1.0 --system "Qısa cavab ver." --temperature 0.7
  echo "Bakı haradadır?" | azquant chat az-chat-q4_0.gguf
""",
)
@click.argument("model", type=MODEL_FILE)
@store_option
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Most tokens of an answer.")
@sampling_options
@model_options
def chat(model: Path, system: str | None, max_tokens: int, **given: Any) -> None:
    """Talk to MODEL, a GGUF file or NAME:TAG in the store, which must have a chat template.

    Each line is a message, and the model sees the whole conversation. /clear begins a new one, /bye or the
    end of the input ends. Without a chat template use `azquant generate`.
    """
    import_numpy()
    options = answer_options(max_tokens, given)
    loaded = load_model(model, given, n_seq=1)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    if on_terminal:
        say("note", "/clear begins a new conversation, /bye ends")
    for line in _lines(on_terminal):
        if line.strip() == "/bye":
            break
        if line.strip() == "/clear":
            messages = list(start)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        pieces = []
        try:
            for piece in loaded.submit_chat(messages, **options):
                pieces.append(piece)
                write(for_terminal(piece) if sys.stdout.isatty() else piece)
        except ContextLengthError as error:
            if not on_terminal:
                raise
            messages.pop()
            say("error", f"{error}; /clear begins a new conversation")
            continue
        write("\n")
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _lines(on_terminal: bool) -> Iterator[str]:
    """What the user writes, or standard input's lines."""
    if sys.stdin is None:
        return
    while True:
        if on_terminal:
            write(dim("> "))
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ArgumentError(f"standard input is not UTF-8 (byte {error.start})") from None
        if not line:
            return
        yield line.removesuffix("\n").removesuffix("\r")
