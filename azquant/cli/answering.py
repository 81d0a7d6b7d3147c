"""Options of the verbs that let a model write, and the model and options they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from azquant.cli.console import say

if TYPE_CHECKING:
    from azquant.engine import GenerateOptions, Model

__all__ = ["answer_options", "load_model", "model_options", "sampling_options"]

F = TypeVar("F", bound=Callable[..., Any])

_SAMPLING = (
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token."),
    click.option(
        "--top-k", type=int, default=0, help="Draw from the k likeliest tokens only.  [default: all]"
    ),
    click.option(
        "--top-p", type=float, default=1.0, help="Draw from the likeliest that make p.  [default: all]"
    ),
    click.option(
        "--min-p", type=float, default=0.0, help="Only tokens this share as likely as the likeliest."
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Above 1: tokens that were there are less likely.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="Taken from a token's logit each time it was written.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="Taken once from the logit of a token once written.",
    ),
    click.option("--stop", multiple=True, help="End before this text; may be given several times."),
    click.option("--seed", type=int, help="Same seed, same text.  [default: a new one each time]"),
)
_MODEL = (
    click.option("--threads", type=int, help="Threads to use.  [default: the processors available]"),
    click.option("--n-ctx", type=int, help="Positions for prompt and answer.  [default: all the model has]"),
    click.option(
        "--kv-type",
        type=click.Choice(["f16", "f32", "q8_0"]),
        default="f16",
        show_default=True,
        help="Type of the KV cache; q8_0 halves it.",
    ),
    click.option("--reproducible", is_flag=True, help="The same bits for any number of threads."),
)


def sampling_options(command: F) -> F:
    """``--temperature`` and what else chooses the next token."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """``--threads`` and what else says how a model runs."""
    for option in reversed(_MODEL):
        command = option(command)
    return command


def answer_options(max_tokens: int, given: dict[str, Any]) -> GenerateOptions:
    """The engine's options from the verb's. Raises ArgumentError for wrong ones, before a model is loaded."""
    from azquant.engine import Options

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty")
    options: GenerateOptions = {"max_tokens": max_tokens}
    for name in (*names, "presence_penalty", "stop", "seed"):
        options[name] = given[name]  # type: ignore[literal-required]  # the names above are all keys
    Options(**options)
    if given["temperature"] == 0 and (given["top_k"] or given["top_p"] < 1 or given["seed"] is not None):
        say("warning", "--top-k, --top-p and --seed have no effect at temperature 0; try --temperature 0.8")
    return options


def load_model(path: Path, given: dict[str, Any], *, n_seq: int | None = None) -> Model:
    """The model, loaded as the verb's options say."""
    import azquant

    if given["threads"] is not None:
        azquant.set_num_threads(given["threads"])
    return azquant.load(
        path,
        reproducible=given["reproducible"],
        kv_type=given["kv_type"],
        n_ctx=given["n_ctx"],
        n_seq=n_seq,
    )
