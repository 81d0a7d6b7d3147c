"""The proof of a conversion, as ``azquant convert`` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from azquant.cli.console import print_table, say, visible, write

if TYPE_CHECKING:
    from azquant.conversion import ConversionReport, Coverage
    from azquant.evaluate import Distance, Proof

__all__ = ["print_proof"]

_SHOWN = 3


def print_proof(report: ConversionReport, proof: Proof | None) -> None:
    """Tensors, tokenizer and predictions, each against the checkpoint; without a proof the first two."""
    write(f"tensors: {_coverage(report.coverage)}\n")
    if report.tokenizer is not None:
        write(f"tokenizer in llama.cpp: {visible(str(report.tokenizer))}\n")
    if proof is None:
        return
    heads = ["", "mean KL", "same top token", "perplexity", "largest logit difference"]
    rows = [["file against checkpoint", *_cells(proof.distance)]]
    if proof.llama_cpp is not None:
        rows.append(["llama.cpp against azquant", *_cells(proof.llama_cpp)])
    title = (
        f"proof: {proof.tokens:,} tokens of {visible(proof.text)}; the checkpoint run by {proof.reference}"
    )
    better = proof.better
    if better is not None:
        said = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in better.options.items())
        say(
            "warning",
            f"the model predicts {visible(proof.text)} better with {said} (perplexity "
            f"{better.perplexity:.4g} instead of {proof.distance.reference_perplexity:.4g}): it was probably "
            "trained so",
        )
    print_table(heads, rows, right=(1, 2, 3, 4), title=title)


def _cells(distance: Distance) -> list[str]:
    return [
        f"{distance.mean_kl:.6f}",
        f"{distance.same_top:.2%}",
        f"{distance.reference_perplexity:.4g} -> {distance.perplexity:.4g}",
        f"{distance.max_difference:.3g}",
    ]


def _coverage(coverage: Coverage) -> str:
    said = f"{len(coverage.once)} of the checkpoint's {coverage.total} stored once"
    if coverage.twice:
        said += f", {len(coverage.twice)} twice ({', '.join(map(visible, coverage.twice[:_SHOWN]))})"
    if not coverage.left_out:
        return said
    names = ", ".join(f"{visible(name)}: {why}" for name, why in coverage.left_out[:_SHOWN])
    more = ", ..." if len(coverage.left_out) > _SHOWN else ""
    return f"{said}, {len(coverage.left_out)} not as tensors ({names}{more})"
