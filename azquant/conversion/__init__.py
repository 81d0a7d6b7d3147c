"""Conversion of Hugging Face checkpoints to GGUF: plan every tensor, then stream each one into the file."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azquant._hashing import hashing
from azquant.architectures import Architecture, architecture_of_config
from azquant.checkpoint import Checkpoint, StackedTensor, open_checkpoint
from azquant.conversion.agreement import Agreement
from azquant.conversion.from_scratch import ScratchOptions, recognize
from azquant.conversion.lora import open_adapter
from azquant.conversion.metadata import general_metadata, source_metadata
from azquant.conversion.modelfile import check_for_ollama, modelfile_text, write_modelfile
from azquant.conversion.naming import check_version, output_path
from azquant.conversion.plan import CONVERT_TYPES, Plan, make_plan
from azquant.conversion.recipe import get_target
from azquant.conversion.report import ConversionReport, Coverage, TensorRow
from azquant.conversion.stack import StackedSource
from azquant.conversion.tokenizer import tokenizer_proof
from azquant.conversion.write import pieces
from azquant.cpu import num_threads
from azquant.errors import ArgumentError, ConversionError, ConversionWarning
from azquant.gguf import MetadataValue, TensorSpec, check_output, write_gguf, write_split_gguf
from azquant.types import GGMLType

if TYPE_CHECKING:
    from azquant.conversion.quantize import quantize_file

__all__ = [
    "CONVERT_TYPES",
    "Agreement",
    "ConversionReport",
    "Coverage",
    "TensorRow",
    "check_for_ollama",
    "convert",
    "modelfile_text",
    "quantize_file",
    "write_modelfile",
]


def __getattr__(name: str) -> Any:
    if name != "quantize_file":  # what a conversion does not need is imported when it is asked for
        raise AttributeError(f"module 'azquant.conversion' has no attribute {name!r}")
    return getattr(importlib.import_module("azquant.conversion.quantize"), name)


# Names of weight files that say nothing of the model; the folder's name is better.
_SAY_NOTHING = ("ckpt", "checkpoint", "model", "pytorch_model", "best", "final", "last")


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str] | None = None,
    type: str | GGMLType = "q4_0",
    *,
    lora: str | PathLike[str] | None = None,
    version: str | None = None,
    split_max_size: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: str | PathLike[str] | None = None,
    activation: str | None = None,
    attention_scale: str | None = None,
    heads: int | None = None,
    strict: bool = False,
    corpus: str | PathLike[str] | None = None,
) -> ConversionReport:
    """Convert the checkpoint ``src`` to the GGUF file ``dst``.

    ``src`` is a folder with config.json and weights, as save_pretrained leaves it, or the torch file of a
    model that somebody wrote: nanoGPT's, or the "let's build GPT" layout (token_embedding_table, ...), whose
    sizes are read off the tensors. ``activation`` (``"gelu"``, ``"gelu_tanh"``, ``"relu"``),
    ``attention_scale`` (``"head"`` or ``"embedding"``: what scores are divided by the root of) and ``heads``
    say what such a file does not. What GGUF's gpt2 has no place for (exact GELU, a bias of the output head)
    is written in keys of azquant's own, with a ConversionWarning of what llama.cpp leaves out.

    ``tokenizer`` is a tokenizer.json or tokenizer.model, or a folder with one, if not beside the weights. How
    often llama.cpp's tokens will differ from it is counted on ``corpus`` (a UTF-8 file; azquant's sample of
    many scripts by default) and stands in the report. Where they can differ a ConversionWarning says why;
    ``strict`` makes it a TokenizerError.

    ``type`` is a target of :data:`azquant.conversion.recipe.TARGETS`: q4_0, q4_k_m, q8_0, f16, ... Each
    tensor gets the type that llama-quantize would give it: norms, biases and positions stay f32, the output
    head (or the embedding that serves as one) is q6_k in a q4_0 file, rows that no block fits give way to a
    type that fits, with a ConversionWarning. One band of rows is in memory at a time.

    Without ``dst``, or where it is a folder, the file is named by the GGUF convention, for example
    az-llm-134M-v1.0-Q4_0.gguf; the report says how. ``version`` ("v1.1") is written as general.version.
    ``lora`` is a PEFT adapter folder, merged in float32 before anything is quantized. A model of more than
    ``split_max_size`` bytes becomes several files, ``dst`` with -00001-of-0000N before its ending; the report
    names the first.

    ``dst`` appears whole or not at all, and replaces an existing file only with ``overwrite``. With
    ``dry_run`` everything is checked but the weights' values, and nothing is written. ``progress(done,
    total)`` is told the bytes of the file written so far.

    Raises InputFileError, CheckpointError, ConversionError (UnsupportedArchitectureError for a model that
    azquant does not know), TokenizerError, NonFiniteError, UnsupportedTypeError, ArgumentError, OutputError;
    each message names the file, key or tensor at fault.
    """
    wanted = get_target(type)
    if split_max_size is not None and split_max_size < 1:
        raise ArgumentError(f"split_max_size is {split_max_size}; it must be at least 1")
    version = None if version is None else check_version(version)
    options = ScratchOptions(activation, attention_scale, heads)
    source, destination = Path(src), None if dst is None else Path(dst)
    if destination is not None and not destination.is_dir():
        check_output(destination, overwrite=overwrite)  # before anything is read
    with open_checkpoint(source) as checkpoint, ExitStack() as opened:
        adapter = None if lora is None else open_adapter(Path(lora), opened)
        files = (*checkpoint.files, *(adapter.files if adapter else ()))
        hashes = None if dry_run else opened.enter_context(hashing(files))  # what takes longest begins first
        architecture, config, hf_config, weights, more_notes = _model(checkpoint, options)
        plan = make_plan(architecture, config, weights, wanted, adapter)
        folder = source if source.is_dir() else source.parent
        tokenizer_path = folder if tokenizer is None else Path(tokenizer)
        tokenizer_keys, agreement, said = _tokenizer(
            tokenizer_path, config.vocab_size, hf_config, strict, None if corpus is None else Path(corpus)
        )
        for message in (*plan.warnings, *said):
            warnings.warn(message, ConversionWarning, stacklevel=2)
        before, after = general_metadata(
            folder,
            hf_config,
            architecture.name,
            wanted,
            plan.size_label,
            checkpoint.format,
            version=version,
            base_model=adapter.base_model if adapter else "",
        )
        output = output_path(destination, before, wanted)
        if output is not destination:
            check_output(output, overwrite=overwrite)
        written = [output]
        if hashes is not None:
            items = {item.rule.name: item for item in plan.tensors}
            written = _write(
                output,
                lambda found: {
                    **before,
                    **config.metadata(),
                    **after,
                    **source_metadata(files, found),
                    **tokenizer_keys,
                },
                hashes,
                [item.spec for item in plan.tensors],
                lambda spec: pieces(items[spec.name]),
                files,
                split_max_size,
                overwrite=overwrite,
                progress=progress,
                threads=num_threads(),
            )
        merged = (f"LoRA adapter {lora}: {len(adapter)} modules merged in float32",) if adapter else ()
        return ConversionReport(
            source=source,
            destination=written[0],
            architecture=architecture.name,
            type=wanted.name,
            tensors=_rows(plan),
            source_bytes=_size(checkpoint),
            file_bytes=None if dry_run else sum(path.stat().st_size for path in written),
            warnings=(*plan.warnings, *said),
            notes=(*more_notes, *plan.notes, *merged),
            coverage=_coverage(plan, architecture, checkpoint),
            tokenizer=agreement,
        )


def _write(
    output: Path,
    metadata: Callable[[list[str]], dict[str, MetadataValue]],
    hashes: Callable[[], list[str]],
    specs: list[TensorSpec],
    data: Callable[[TensorSpec], Iterable[Any]],
    files: tuple[Path, ...],
    split_max_size: int | None,
    **options: Any,
) -> list[Path]:
    """One file, or several where the tensors take more than ``split_max_size`` bytes.

    ``metadata`` are made of the ``hashes`` of ``files``; one file is written before they are known.
    """
    options["sources"] = files
    if split_max_size is not None and sum(spec.nbytes for spec in specs) > split_max_size:
        prefix = output.with_suffix("") if output.suffix == ".gguf" else output
        options["max_bytes"] = split_max_size
        return write_split_gguf(prefix, metadata(hashes()), specs, data, **options)
    placeholder = metadata(["0" * 64 for _ in files])
    write_gguf(output, placeholder, specs, data, late=lambda: metadata(hashes()), **options)
    return [output]


def _model(
    checkpoint: Checkpoint, options: ScratchOptions
) -> tuple[Architecture[Any], Any, dict[str, Any], Checkpoint, tuple[str, ...]]:
    """Architecture, its config, config.json (or what stands for it), the tensors to plan with, and notes."""
    hf_config = checkpoint.config
    if hf_config is None:
        found = recognize(checkpoint, options)
        stem = checkpoint.path.stem
        stand_in = {} if stem in _SAY_NOTHING else {"_name_or_path": stem.replace("_", "-")}
        notes = (f"{found.layout} checkpoint: sizes read off the tensors", *found.notes)
        return found.architecture, found.config, stand_in, found.checkpoint, notes
    if options.given:
        raise ArgumentError(
            f"{', '.join(options.given)}: only for checkpoints without a config.json; here it decides"
        )
    architecture = architecture_of_config(hf_config)
    if hf_config.get("quantization_config"):
        raise ConversionError(
            "config.json: quantization_config says these weights are quantized already; "
            "convert the original checkpoint"
        )
    return architecture, architecture.config.from_hf(hf_config), hf_config, checkpoint, ()


def _tokenizer(
    path: Path, vocab_size: int, config: dict[str, Any], strict: bool, corpus: Path | None
) -> tuple[dict[str, MetadataValue], Agreement | None, tuple[str, ...]]:
    """The tokenizer's keys, its proof, and the warnings it gave, to be given again from the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metadata, agreement = tokenizer_proof(path, vocab_size, config, strict=strict, corpus=corpus)
    ours = [item for item in caught if issubclass(item.category, ConversionWarning)]
    for item in caught:
        if item not in ours:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
    return metadata, agreement, tuple(str(item.message) for item in ours)


def _coverage(plan: Plan, architecture: Architecture[Any], checkpoint: Checkpoint) -> Coverage:
    """The plan has refused every tensor that would be lost; what is left out here has its reason."""
    used: Counter[str] = Counter()
    for item in plan.tensors:
        if item.source is not None:
            parts = (
                item.source.parts
                if isinstance(item.source, (StackedTensor, StackedSource))
                else (item.source,)
            )
            used.update(part.name for part in parts)
    left_out = []
    for name, tensor in checkpoint.tensors.items():
        if used[tensor.name]:
            continue
        if name.endswith("lm_head.bias"):
            why = "in the metadata" if tensor.read_f32().any() else "all zeros"
        elif name.endswith(("lm_head.weight", "embed_out.weight", "wte.weight")):
            why = "equal to the embedding"
        else:
            why = "a buffer without weights"
        left_out.append((tensor.name, why))
    return Coverage(
        once=tuple(name for name, count in used.items() if count == 1),
        twice=tuple(name for name, count in used.items() if count > 1),
        left_out=tuple(left_out),
    )


def _size(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def _rows(plan: Plan) -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(
            name=item.rule.name,
            source=item.source.name if item.source else "",
            shape=item.rule.shape,
            source_type=item.source.dtype if item.source else "",
            type=item.type.name,
            nbytes=item.spec.nbytes,
            reason=item.reason,
        )
        for item in plan.tensors
    )
