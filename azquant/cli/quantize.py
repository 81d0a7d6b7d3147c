"""``azquant quantize``: a GGUF file becomes one with fewer bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, print_table, progress_bar, show_bytes, visible, write
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.cli.startup import import_numpy

if TYPE_CHECKING:
    from azquant.conversion import ConversionReport

__all__ = ["quantize"]


def _pairs(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        pattern, _, type_ = value.rpartition("=")
        if not pattern:
            raise click.BadParameter(f"{value!r} is not of the form REGEX=TYPE")
        pairs.append((pattern, type_))
    return pairs


@click.command(
    cls=Verb,
    short_help="Quantize a GGUF file.",
    epilog="""\b
Examples:
  azquant quantize model-f32.gguf model-q4_0.gguf q4_0
  azquant quantize model-f32.gguf model-q4_k_m.gguf q4_k_m --imatrix model.imatrix.gguf
  azquant quantize model-f32.gguf out.gguf q4_0 --tensor-type 'ffn_down=q6_k' --dry-run

\b
Targets: f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q2_k_s q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m
         q5_k_s q5_k_m q6_k iq4_nl iq4_xs tq1_0 tq2_0 mxfp4_moe
""",
)
@click.argument("src", type=MODEL_FILE)
@store_option
@click.argument("dst", type=click.Path(path_type=Path))
@click.argument("target", default="q4_0")
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix of llama-imatrix.")
@click.option("--pure", is_flag=True, help="Every weight in the target's own type.")
@click.option("--output-type", metavar="TYPE", help="Type of the output head.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="REGEX=TYPE",
    callback=_pairs,
    help="Type of the tensors in whose names REGEX is found; may be given again.",
)
@click.option("--allow-requantize", is_flag=True, help="Also tensors that are quantized already.")
@click.option("--strict", is_flag=True, help="Refuse rows that no block of the type fits.")
@click.option(
    "--nonfinite",
    type=click.Choice(("error", "zero")),
    default="error",
    show_default=True,
    help="What becomes of NaN and infinity.",
)
@click.option("--keep-split", is_flag=True, help="Write as many shards as SRC has.")
@click.option(
    "--no-verify",
    "verify",
    flag_value=False,
    default=True,
    help="Do not wait for the disk and read nothing back, as llama-quantize.",
)
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def quantize(
    src: Path, dst: Path, target: str, as_json: bool, quiet: bool, dry_run: bool, **options: Any
) -> None:
    """Quantize the GGUF file SRC to the GGUF file DST.

    TARGET is q4_0 unless given. The types of the tensors and their bytes are those of llama-quantize; a
    tensor that has its type already is copied. DST appears whole or not at all.
    """
    import_numpy()
    import azquant

    with progress_bar(f"writing {visible(dst.name)}", shown=not quiet) as progress:
        report = azquant.quantize_file(src, dst, target, dry_run=dry_run, progress=progress, **options)
    if as_json:
        print_json(_as_dict(report))
    elif not quiet:
        _print_report(report)


def _print_report(report: ConversionReport) -> None:
    if report.file_bytes is None:
        rows = [
            [visible(name), shape, before, after, f"{int(nbytes):,}", visible(reason)]
            for name, shape, before, after, nbytes, reason in report.rows()
        ]
        print_table(("tensor", "shape", "from", "to", "bytes", "why"), rows, right=(4,), title="plan")
    counts = [
        [type_, f"{count}", show_bytes(nbytes)] for type_, (count, _, nbytes) in report.by_type().items()
    ]
    print_table(("type", "tensors", "bytes"), counts, right=(1, 2))
    exceptions = Counter((row.type, row.reason) for row in report.fallbacks)
    if exceptions:
        others = [[f"{count}", type_, visible(reason)] for (type_, reason), count in exceptions.items()]
        title = f"of another type than {report.type}"
        print_table(("tensors", "type", "why"), others, right=(0,), title=title)
    shown, size = visible(str(report.destination)), report.planned_bytes or 0
    ratio = f"{report.source_bytes / max(1, size):.1f} times smaller"
    bits = f"{report.bits_per_weight:.2f} bits per weight"
    if report.file_bytes is None:
        write(f"dry run: nothing was written; {shown} would have {size:,} bytes: {ratio}, {bits}\n")
    else:
        write(f"wrote {shown} ({size:,} bytes): {ratio}, {bits}\n")


def _as_dict(report: ConversionReport) -> dict[str, Any]:
    return {
        "source": str(report.source),
        "destination": str(report.destination),
        "dry_run": report.file_bytes is None,
        "architecture": report.architecture,
        "type": report.type,
        "source_bytes": report.source_bytes,
        "file_bytes": report.file_bytes,
        "planned_bytes": report.planned_bytes,
        "bits_per_weight": report.bits_per_weight,
        "warnings": list(report.warnings),
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "source_type": row.source_type,
                "type": row.type,
                "bytes": row.nbytes,
                "reason": row.reason,
            }
            for row in report.tensors
        ],
    }
