"""``azquant generate``: a GGUF model continues a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import dim, for_terminal, print_json, say, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.errors import ArgumentError

if TYPE_CHECKING:
    from azquant.engine import GenerateOptions, Model

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
""",
)
@click.argument("model", type=MODEL_FILE)
@store_option
@click.argument("prompt", default="")
@click.option("--max-tokens", type=int, default=64, show_default=True, help="Most tokens to generate.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=int, default=0, help="Draw from the k likeliest tokens only.  [default: all]")
@click.option("--top-p", type=float, default=1.0, help="Draw from the likeliest that make p.  [default: all]")
@click.option("--min-p", type=float, default=0.0, help="Only tokens this share as likely as the likeliest.")
@click.option(
    "--repetition-penalty", type=float, default=1.0, help="Above 1: tokens that were there are less likely."
)
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--seed", type=int, help="Same seed, same text.  [default: a new one each time]")
@click.option("--threads", type=int, help="Threads to use.  [default: the processors available]")
@click.option("--reproducible", is_flag=True, help="The same bits for any number of threads.")
@click.option("--ids", is_flag=True, help="PROMPT and answer are token ids, not text.")
@click.option("--echo/--no-echo", default=None, help="Print the prompt too.  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="Print text, token ids and times as JSON at the end.")
@click.option("--stats", is_flag=True, help="Print tokens per second on stderr.")
def generate(
    model: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    threads: int | None,
    reproducible: bool,
    ids: bool,
    echo: bool | None,
    as_json: bool,
    stats: bool,
) -> None:
    """Let MODEL, a GGUF file or NAME:TAG in the store, continue PROMPT; the text appears as it is made.

    PROMPT "-" is read from standard input, without the newline that ends it. No PROMPT: the model begins
    by itself.
    """
    import azquant
    from azquant.engine import Options

    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    Options(**options)  # wrong ones are refused before the model is loaded
    if temperature == 0 and (top_k or top_p < 1 or seed is not None):
        say("warning", "--top-k, --top-p and --seed have no effect at temperature 0; try --temperature 0.8")
    text = _read_stdin() if prompt == "-" else prompt
    if threads is not None:
        azquant.set_num_threads(threads)
    begin = perf_counter()
    loaded = azquant.load(model, reproducible=reproducible)
    run = _Run(_parse_ids(text) if ids else _encode(loaded, text))
    run.load = perf_counter() - begin

    pieces = _pieces(loaded, run, run.prompt if ids else text, options)
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


def _pieces(model: Model, run: _Run, prompt: str | list[int], options: GenerateOptions) -> Iterator[str]:
    """The answer in pieces as they come; fills ``run``."""
    answer = model.submit(prompt, **options)
    for piece in answer:
        yield piece if isinstance(prompt, str) else f"{piece} "
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
    for name, count in (("prefill", len(run.prompt)), ("decode", later)):
        rate = run.rates()[name]
        seconds = getattr(run, name)
        say(name, f"{count} tokens, {seconds:.3f} s" + (f", {rate:.0f} tokens/s" if rate else ""))
