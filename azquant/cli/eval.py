"""``azquant eval``: how well a model predicts a text, and how far it is from another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, print_table, visible
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.text import counting_bar, read_text

if TYPE_CHECKING:
    from azquant.evaluate import Divergence, Perplexity

__all__ = ["evaluate"]


@click.command(
    "eval",
    cls=Verb,
    short_help="Measure a GGUF model's perplexity.",
    epilog="""\b
Examples:
  azquant eval az-llm-q4_0.gguf heldout.txt
  azquant eval az-llm-q4_0.gguf heldout.txt --base az_llm_hf --json
  azquant eval az-llm-q4_0.gguf heldout.txt --base az-llm-f32.gguf --plot positions.png
""",
)
@click.argument("model", type=MODEL_FILE)
@store_option
@click.argument("text", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--base", type=MODEL_FILE, help="A GGUF file or the checkpoint folder to compare with.")
@click.option("--n-ctx", type=int, help="Tokens of a window.  [default: 512, or what the model has]")
@click.option("--chunks", type=int, help="Take only the first windows.  [default: all]")
@click.option("--threads", type=int, help="Threads to use.  [default: the processors available]")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the results over the position (.png, .svg)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def evaluate(
    model: Path,
    text: Path,
    base: Path | None,
    n_ctx: int | None,
    chunks: int | None,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well the GGUF MODEL predicts the file TEXT ("-" is standard input).

    Perplexity is counted as llama-perplexity counts it: the text in windows of --n-ctx tokens, and of each
    its second half. With --base also how far the predictions are from that model's: what quantization cost.
    """
    import azquant
    from azquant import evaluate as library

    if threads is not None:
        azquant.set_num_threads(threads)
    content = read_text(text)
    with counting_bar("windows", shown=not quiet) as progress:
        result, divergence = library.evaluate(
            model, content, base=base, n_ctx=n_ctx, chunks=chunks, progress=progress
        )
    if plot is not None:
        library.plot_positions(plot, result, divergence, title=visible(model.name))
    if as_json:
        print_json(_as_dict(model, text, base, result, divergence))
    else:
        _print_report(model, base, result, divergence)


def _as_dict(
    model: Path, text: Path, base: Path | None, result: Perplexity, divergence: Divergence | None
) -> dict[str, Any]:
    report = {"model": str(model), "text": str(text), **result.as_dict()}
    if divergence is not None:
        report["divergence"] = {"from": str(base), **divergence.as_dict()}
    return report


def _print_report(model: Path, base: Path | None, result: Perplexity, divergence: Divergence | None) -> None:
    facts = result.as_dict()
    rows = [
        ["model", visible(model.name)],
        ["perplexity", f"{result.perplexity:.4f} ± {result.error:.4f}"],
        [
            "windows",
            f"{facts['chunks']} of {facts['n_ctx']} tokens, {facts['tokens_counted']:,} tokens counted",
        ],
    ]
    if divergence is not None and base is not None:
        d = divergence.as_dict()
        change = result.perplexity / divergence.base.perplexity - 1
        rows += [
            ["base", visible(base.name)],
            ["perplexity of the base", f"{divergence.base.perplexity:.4f} ({change:+.2%} from there)"],
            ["mean KL divergence", f"{d['mean_kl']:.6f} ± {d['mean_kl_error']:.6f} nats"],
            ["median, 99%, largest", f"{d['median_kl']:.6f}, {d['p99_kl']:.6f}, {d['max_kl']:.6f}"],
            ["same likeliest token", f"{d['same_top']:.2%}"],
            ["change of p(true token)", f"{d['rms_p_change']:.2%} (root of the mean square)"],
        ]
    print_table(("", ""), rows)
