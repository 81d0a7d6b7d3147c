"""``azquant generate``: a GGUF model continues a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.answering import answer_options, load_model, model_options, sampling_options
from azquant.cli.console import dim, for_terminal, print_json, say, show_bytes, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.startup import import_numpy
from azquant.errors import ArgumentError

if TYPE_CHECKING:
    from azquant.engine import Generation, MemoryNeeds, Model

__all__ = ["generate"]


@dataclass
class _Run:
    """One generation: its tokens as they come, and how long each part took (in seconds)."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    stop: str = "length"
    memory: MemoryNeeds | None = None

    def rates(self) -> dict[str, float | None]:
        """Tokens per second: of the prompt, and of the answer after its first token."""
        later = len(self.tokens) - 1
        return {
            "prefill": len(self.prompt) / self.prefill if self.prefill else None,
            "decode": later / self.decode if later > 0 and self.decode else None,
        }


@click.command(
    cls=Verb,
    short_help="Continue a prompt with a GGUF model.",
    epilog="""\b
Examples:
  azquant generate az-llm-q4_0.gguf "Azərbaycan" --max-tokens 100
  azquant generate az-llm:v1.0 "Bakı" --temperature 0.8 --top-k 40 --seed 1
  echo "Bir gün" | azquant generate az-llm-q4_0.gguf - --stats
  azquant generate az-llm-q4_0.gguf "17 4 256" --ids
  azquant generate az-chat-q4_0.gguf "Salam!" --chat --system "Qısa cavab ver."
""",
)
@click.argument("model", type=MODEL_FILE)
@store_option
@click.argument("prompt", default="")
@click.option("--max-tokens", type=int, default=64, show_default=True, help="Most tokens to generate.")
@click.option("--chat", is_flag=True, help="PROMPT is a message; the model's chat template stands around it.")
@click.option("--system", help="With --chat: what the model is told before the message.")
@sampling_options
@model_options
@click.option("--ids", is_flag=True, help="PROMPT and answer are token ids, not text.")
@click.option("--echo/--no-echo", default=None, help="Print the prompt too.  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="Print text, token ids and times as JSON at the end.")
@click.option("--stats", is_flag=True, help="Print tokens per second on stderr.")
def generate(
    model: Path,
    prompt: str,
    max_tokens: int,
    chat: bool,
    system: str | None,
    ids: bool,
    echo: bool | None,
    as_json: bool,
    stats: bool,
    **given: Any,
) -> None:
    """Let MODEL, a GGUF file or NAME:TAG in the store, continue PROMPT; the text appears as it is made.

    PROMPT "-" is read from standard input, without the newline that ends it. No PROMPT: the model begins
    by itself.
    """
    import_numpy()
    if chat and ids:
        raise ArgumentError("--chat takes text, --ids takes token ids: give one of them")
    if system is not None and not chat:
        raise ArgumentError("--system needs --chat")
    options = answer_options(max_tokens, given)
    text = _read_stdin() if prompt == "-" else prompt
    begin = perf_counter()
    loaded = load_model(model, given)
    messages = [{"role": "system", "content": system}] * (system is not None)
    messages.append({"role": "user", "content": text})
    if chat:
        run = _Run(loaded.chat_tokens(messages))
    else:
        run = _Run(_parse_ids(text) if ids else _encode(loaded, text))
    run.load = perf_counter() - begin
    run.memory = loaded.memory

    if chat:
        answering = loaded.submit_chat(messages, **options)
    else:
        answering = loaded.submit(run.prompt if ids else text, **options)
    pieces = _pieces(answering, run)
    if as_json:
        answer = "".join(pieces)
        print_json(_as_dict(run, None if ids else text, None if ids else answer))
    else:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        if on_terminal if echo is None else echo:
            write(dim(_shown(text + " " * ids, on_terminal)))
        for piece in pieces:
            write(_shown(piece, on_terminal))
        write("\n")
    if stats:
        _print_stats(run)


def _shown(text: str, on_terminal: bool) -> str:
    return for_terminal(text) if on_terminal else text


def _read_stdin() -> str:
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the prompt on standard input is not UTF-8 (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")


def _parse_ids(text: str) -> list[int]:
    ids = []
    for word in text.replace(",", " ").split():
        try:
            ids.append(int(word))
        except ValueError:
            raise ArgumentError(
                f"--ids: {word!r} is no token id; give whole numbers, such as '17 4 256'"
            ) from None
    return ids


def _encode(model: Model, text: str) -> list[int]:
    ids = model.tokenizer.encode(text)
    return [model.tokenizer.bos_id] if not ids and model.tokenizer.bos_id is not None else ids


def _pieces(answer: Generation, run: _Run) -> Iterator[str]:
    """The answer in pieces as they come; fills ``run``."""
    for piece in answer:
        yield piece if isinstance(piece, str) else f"{piece} "
    done = answer.result()
    run.prefill = done.seconds if done.seconds_to_first is None else done.seconds_to_first
    run.decode = done.seconds - run.prefill  # without the time that printing took
    run.tokens, run.stop = done.tokens, done.finish_reason


def _as_dict(run: _Run, prompt: str | None, text: str | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": run.prompt,
        "tokens": run.tokens,
        "stop": run.stop,
        "seconds": {"load": run.load, "prefill": run.prefill, "decode": run.decode},
        "tokens_per_second": run.rates(),
    }


def _print_stats(run: _Run) -> None:
    later = max(0, len(run.tokens) - 1)
    say("load", f"{run.load:.3f} s")
    if (memory := run.memory) is not None:
        sizes = (memory.weights, memory.cache_per_sequence, memory.work)
        say("memory", "weights {}, KV cache up to {} an answer, buffers {}".format(*map(show_bytes, sizes)))
    for name, count in (("prefill", len(run.prompt)), ("decode", later)):
        rate = run.rates()[name]
        seconds = getattr(run, name)
        say(name, f"{count} tokens, {seconds:.3f} s" + (f", {rate:.0f} tokens/s" if rate else ""))
