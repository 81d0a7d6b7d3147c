"""``azquant verify``: whether a GGUF file is whole and sound, and how far it is from its source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, print_table, progress_bar, say, shorten, visible
from azquant.cli.guard import WRONG_INPUT, Verb
from azquant.cli.model_file import MODEL_FILE, store_option

if TYPE_CHECKING:
    from azquant.evaluate import TensorCheck, VerifyReport

__all__ = ["verify"]

_NAME_LENGTH = 80
_ROWS = 5000


@click.command(
    cls=Verb,
    short_help="Check a GGUF file, and compare it with its source.",
    epilog="""\b
Examples:
  azquant verify az-llm-q4_0.gguf
  azquant verify az-llm-q4_0.gguf --against az_llm_hf --plot errors.png
  azquant verify az-llm-q4_0.gguf --against az-llm-f32.gguf --json | jq .worst
""",
)
@click.argument("file", type=MODEL_FILE)
@store_option
@click.option("--against", type=MODEL_FILE, help="Another GGUF file, or a checkpoint.")
@click.option("--hash", "hashes", is_flag=True, help="Give the SHA-256 of each tensor's bytes.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the errors by layer: .png, .svg or .pdf.")
@click.option("--overwrite", is_flag=True, help="Replace the picture if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print only problems; the exit code tells the rest.")
@click.pass_context
def verify(
    context: click.Context,
    file: Path,
    against: Path | None,
    hashes: bool,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the GGUF FILE: its structure, its tensors against its metadata, that every scale is finite.

    With --against, each tensor is compared with the same one of the source: root mean square error, largest
    error, signal-to-noise ratio, and whether its bytes are the very ones that quantizing the source gives.

    The exit code is 0 when nothing is wrong and 2 when something is.
    """
    from azquant import evaluate
    from azquant.gguf import check_output

    if plot is not None:
        if against is None:
            raise click.UsageError("--plot draws a comparison: give --against too")
        check_output(plot, overwrite=overwrite, sources=(file, against))  # before the long work
    with progress_bar(f"reading {visible(file.name)}", shown=not quiet) as progress:
        report = evaluate.verify(file, against, hashes=hashes, progress=progress)
    if plot is not None:
        evaluate.plot_verification(report, plot, overwrite=overwrite)
    if as_json:
        print_json(_as_dict(report))
    elif not quiet:
        _print(report)
    if not as_json:
        for problem in report.problems:
            say("problem", problem)
    if not report.ok:
        context.exit(WRONG_INPUT)


def _print(report: VerifyReport) -> None:
    compared = report.against is not None
    hashed = any(check.sha256 for check in report.tensors)
    if compared or hashed:
        head = ["tensor", "type"]
        head += ["from", "RMSE", "max error", "SNR (dB)", "same bytes"] if compared else []
        rows = [_row(check, compared, hashed) for check in report.tensors[:_ROWS]]
        print_table([*head, *(["sha256"] if hashed else [])], rows, right=(3, 4, 5) if compared else ())
        if len(report.tensors) > _ROWS:
            click.echo(f"… and {len(report.tensors) - _ROWS:,} more; --json gives them all\n")
    worst = _worst(report)
    if worst is not None and worst.errors is not None:
        click.echo(f"worst: {shorten(worst.name, _NAME_LENGTH)} at {worst.errors.snr_db:.2f} dB")
    for note in report.notes:
        click.echo(f"note: {visible(note)}")
    if report.ok:
        click.echo(f"{visible(str(report.path))}: {len(report.tensors)} tensors, nothing wrong")


def _row(check: TensorCheck, compared: bool, hashed: bool) -> list[str]:
    row = [shorten(check.name, _NAME_LENGTH), check.type]
    if compared:
        row.append(check.source_type or "–")
        if check.errors is None:
            row += ["–", "–", "–"]
        else:
            snr = check.errors.snr_db
            row += [f"{check.errors.rmse:.3g}", f"{check.errors.max_error:.3g}"]
            row.append("exact" if snr == math.inf else f"{snr:.2f}")
        row.append("–" if check.reproduced is None else "yes" if check.reproduced else "no")
    return [*row, check.sha256 or "–"] if hashed else row


def _worst(report: VerifyReport) -> TensorCheck | None:
    """The tensor with the lowest signal-to-noise ratio; ``None`` where none has an error."""
    noisy = [check for check in report.tensors if check.errors and check.errors.snr_db < math.inf]
    return min(noisy, key=lambda check: check.errors.snr_db if check.errors else math.inf, default=None)


def _as_dict(report: VerifyReport) -> dict[str, Any]:
    worst = _worst(report)
    return {
        "file": str(report.path),
        "against": None if report.against is None else str(report.against),
        "ok": report.ok,
        "problems": list(report.problems),
        "notes": list(report.notes),
        "worst": None if worst is None else worst.name,
        "tensors": [
            {
                "name": check.name,
                "shape": list(check.shape),
                "type": check.type,
                "bytes": check.nbytes,
                "sha256": check.sha256,
                "source_type": check.source_type,
                **(
                    {"rmse": None, "max_error": None, "max_index": None, "snr_db": None}
                    if check.errors is None
                    else check.errors._asdict()
                ),
                "reproduced": check.reproduced,
            }
            for check in report.tensors
        ],
    }
