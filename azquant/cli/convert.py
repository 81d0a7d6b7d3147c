"""``azquant convert``: a checkpoint folder becomes a GGUF file."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant._hashing import hashing_ahead
from azquant.cli.console import (
    print_json,
    print_table,
    progress_bar,
    say,
    show_bytes,
    show_count,
    visible,
    write,
)
from azquant.cli.guard import Verb
from azquant.cli.options import size_option
from azquant.cli.proof import print_proof
from azquant.cli.startup import import_numpy

if TYPE_CHECKING:
    from azquant.conversion import ConversionReport, TensorRow

__all__ = ["convert"]

_PROVED_BY_DEFAULT = 16_000_000
"""Most weights of a model that is proved without being asked to: a matter of seconds."""

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}


@click.command(
    cls=Verb,
    short_help="Convert a checkpoint to a GGUF file.",
    epilog="""\b
Examples:
  azquant convert az_llm_hf az-llm-q4_0.gguf
  azquant convert az_llm_hf az-llm-q8_0.gguf --type q8_0 --overwrite
  azquant convert az_llm_hf az-llm-q4_0.gguf --dry-run
  azquant convert az_llm_hf --version v1.1 --modelfile
  azquant convert az_llm_hf az-llm-chat.gguf --lora az_llm_lora
  azquant convert az_llm_100m_final.pt --tokenizer az_llm-tokenizer.json -o az-llm.gguf
""",
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The same as DST.")
@click.option(
    "--type",
    "type_",
    default="q4_0",
    show_default=True,
    help="q4_0, q4_k_m, q8_0, f16, ...; see azquant quantize -h.",
)
@click.option("--lora", type=click.Path(path_type=Path), help="A PEFT adapter folder to merge, in float32.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json or .model, if not beside the weights.",
)
@click.option(
    "--activation", type=click.Choice(["gelu", "gelu_tanh", "relu"]), help="Of a from-scratch model.  [gelu]"
)
@click.option(
    "--attention-scale",
    type=click.Choice(["head", "embedding"]),
    help="Of a from-scratch model: scores divided by sqrt(head size) or sqrt(n_embd).  [head]",
)
@click.option("--heads", type=int, help="Attention heads, where a from-scratch checkpoint does not tell.")
@click.option("--strict", is_flag=True, help="Refuse a tokenizer that llama.cpp would not run exactly.")
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    help="UTF-8 text to compare tokenizers and models on.  [azquant's sample of many scripts]",
)
@click.option(
    "--prove/--no-prove",
    default=None,
    help="Compare the file's predictions with the checkpoint's.  [up to 16 million weights: yes]",
)
@click.option("--version", metavar="V", help="The model's version, such as v1.1.")
@click.option(
    "--split-max-size", callback=size_option, metavar="SIZE", help="Several files of at most 500M, 2G, ..."
)
@click.option("--modelfile", is_flag=True, help="Write a Modelfile for `ollama create` beside the file.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan, tensor by tensor; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="Print only warnings and errors.")
def convert(
    src: Path,
    dst: Path | None,
    output: Path | None,
    type_: str,
    lora: Path | None,
    tokenizer: Path | None,
    activation: str | None,
    attention_scale: str | None,
    heads: int | None,
    strict: bool,
    corpus: Path | None,
    prove: bool | None,
    version: str | None,
    split_max_size: int | None,
    modelfile: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert the checkpoint SRC to the GGUF file DST.

    SRC is a folder as save_pretrained writes it: config.json, the weights (safetensors or
    pytorch_model.bin, also in shards) and tokenizer.json or tokenizer.model. Or it is the weight file of
    a model written by hand: nanoGPT's ckpt.pt, or a course's .pt (token_embedding_table, ...). Known
    are GPT-2, Llama, Mistral, SmolLM,
    Qwen 2 and 3, Gemma 2 and 3 (text), Phi 3, GPT-NeoX, StarCoder 2, OLMo 2, Granite and Falcon.

    DST appears whole or not at all; llama.cpp and Ollama read it too. Without DST, or where it is a
    folder, the file is named by the GGUF convention, as in az-llm-134M-v1.0-Q4_0.gguf.
    """
    if dst is not None and output is not None:
        raise click.UsageError("give DST or --output, not both")
    dst = output if dst is None else dst
    scratch: dict[str, Any] = {"activation": activation, "attention_scale": attention_scale, "heads": heads}
    target = "the file" if dst is None else visible(dst.name)
    # What takes longest begins first: most folders have their weights here.
    weights = src / "model.safetensors" if src.is_dir() else src
    with (
        hashing_ahead(() if dry_run else (weights,)),
        progress_bar(f"writing {target}", shown=not quiet) as progress,
    ):
        import_numpy()
        from azquant import conversion

        report = conversion.convert(
            src,
            dst,
            type_,
            lora=lora,
            version=version,
            tokenizer=tokenizer,
            strict=strict,
            corpus=corpus,
            **scratch,
            split_max_size=split_max_size,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if modelfile and not dry_run:
        written = conversion.write_modelfile(report.destination, overwrite=overwrite)
        for problem in conversion.check_for_ollama(report.destination):
            say("warning", f"Ollama: {problem}")
        if not (quiet or as_json):
            write(f"wrote {visible(str(written))}; next:  ollama create <name> -f {visible(str(written))}\n")
    proof = None
    if not dry_run and split_max_size is None and (_is_small(report) if prove is None else prove):
        from azquant.evaluate import prove as prove_it

        proof = prove_it(report, text=corpus, tokenizer=tokenizer, lora=lora, **scratch)
    if as_json:
        print_json(_as_dict(report) | {"proof": None if proof is None else proof.as_dict()})
    elif not quiet:
        _print_report(report)
        print_proof(report, proof)


def _print_report(report: ConversionReport) -> None:
    if report.file_bytes is None:
        _print_plan(report)
    _print_before_after(report)
    exceptions = Counter((row.type, row.reason) for row in report.fallbacks)
    if exceptions:
        rows = [[f"{count}", type_, visible(reason)] for (type_, reason), count in exceptions.items()]
        print_table(("tensors", "type", "why"), rows, right=(0,), title=f"of another type than {report.type}")
    for note in report.notes:
        write(f"note: {visible(note)}\n")
    shown = visible(str(report.destination))
    if report.file_bytes is None:
        write(
            f"dry run: nothing was written; {shown} would hold {report.tensor_bytes:,} bytes of tensors, "
            "and the header with the tokenizer\n"
        )
        return
    write(f"wrote {shown} ({report.file_bytes:,} bytes)\n")
    if shown == str(report.destination):
        prompt = "'Azərbaycan'" if _has_tokenizer(report.destination) else "--ids '1 2 3'"
        write(f"next:  azquant generate {shlex.quote(shown)} {prompt}\n")


def _is_small(report: ConversionReport) -> bool:
    return report.parameters <= _PROVED_BY_DEFAULT


def _has_tokenizer(path: Path) -> bool:
    from azquant.gguf import keys, open_gguf

    with open_gguf(path) as file:
        return keys.TOKENS in file.metadata


def _print_before_after(report: ConversionReport) -> None:
    after = report.tensor_bytes if report.file_bytes is None else report.file_bytes
    ratio = f"{report.source_bytes / after:.1f} times smaller" if after < report.source_bytes else ""
    rows = [
        ["size", show_bytes(report.source_bytes), show_bytes(after), ratio],
        ["bits per weight", _show_bits(_bits_before(report.tensors)), _show_bits(report.bits_per_weight), ""],
        ["weights", "", show_count(report.parameters), f"{report.architecture} model"],
    ]
    before = Counter(row.source_type for row in report.tensors if row.source_type)
    counts = {type_: count for type_, (count, _, _) in report.by_type().items()}
    for i, (left, right) in enumerate(_side_by_side(before, counts)):
        rows.append(["" if i else "tensors", left, right, ""])
    print_table(("", "before", "after", ""), rows, right=(1, 2))


def _side_by_side(before: dict[str, int], after: dict[str, int]) -> list[tuple[str, str]]:
    left = [f"{count} {name}" for name, count in sorted(before.items(), key=lambda item: -item[1])]
    right = [f"{count} {name}" for name, count in sorted(after.items(), key=lambda item: -item[1])]
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    return list(zip(left, right, strict=True))


def _bits_before(rows: tuple[TensorRow, ...]) -> float:
    read = [row for row in rows if row.source_type]
    return sum(_BITS[row.source_type] * row.elements for row in read) / max(
        1, sum(row.elements for row in read)
    )


def _show_bits(bits: float) -> str:
    return f"{bits:.2f}"


def _print_plan(report: ConversionReport) -> None:
    rows = [
        [visible(name), shape, before, after, f"{int(nbytes):,}", visible(reason)]
        for name, shape, before, after, nbytes, reason in report.rows()
    ]
    print_table(("tensor", "shape", "from", "to", "bytes", "why"), rows, right=(4,), title="plan")


def _as_dict(report: ConversionReport) -> dict[str, Any]:
    return {
        "source": str(report.source),
        "destination": str(report.destination),
        "dry_run": report.file_bytes is None,
        "architecture": report.architecture,
        "type": report.type,
        "parameters": report.parameters,
        "source_bytes": report.source_bytes,
        "file_bytes": report.file_bytes,
        "tensor_bytes": report.tensor_bytes,
        "bits_per_weight": report.bits_per_weight,
        "types": {
            type_: {"tensors": count, "parameters": elements, "bytes": nbytes}
            for type_, (count, elements, nbytes) in report.by_type().items()
        },
        "warnings": list(report.warnings),
        "notes": list(report.notes),
        "tensors": [
            {
                "name": row.name,
                "source": row.source,
                "shape": list(row.shape),
                "source_type": row.source_type,
                "type": row.type,
                "bytes": row.nbytes,
                "reason": row.reason,
            }
            for row in report.tensors
        ],
    }
