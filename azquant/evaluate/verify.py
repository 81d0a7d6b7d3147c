"""Verifying a GGUF file: that it is whole and sound, and how far its weights are from their source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from azquant.architectures import Architecture
from azquant.errors import ArgumentError, NonFiniteError
from azquant.evaluate.difference import ErrorSums, TensorErrors
from azquant.evaluate.hashes import tensor_sha256
from azquant.evaluate.scales import count_not_finite
from azquant.evaluate.soundness import Findings, check_file
from azquant.evaluate.weights import Reference, can_decode, decode, open_references
from azquant.gguf import GGUFFile, GGUFTensor, open_gguf
from azquant.ops import encode_rows

__all__ = ["TensorCheck", "VerifyReport", "verify"]

_PIECE = 1 << 24  # bytes compared together


@dataclass(frozen=True)
class TensorCheck:
    """What was found about one tensor."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    sha256: str | None = None
    """Of its bytes in the file; ``None`` when not asked for."""
    source_type: str | None = None
    """What the source stores it as; ``None`` without a source."""
    errors: TensorErrors | None = None
    """The difference from the source; ``None`` where there is no source or no number."""
    reproduced: bool | None = None
    """Whether its bytes are the very ones that azquant (and ggml's reference quantizer) makes of the source;
    ``None`` where the source is quantized itself, or azquant cannot make the type."""


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of :func:`verify`."""

    path: Path
    against: Path | None
    tensors: tuple[TensorCheck, ...]
    problems: tuple[str, ...]
    """What is wrong; each names the key or tensor."""
    notes: tuple[str, ...]
    """What is unusual, or could not be checked."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    hashes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check the GGUF file at ``path``, and compare it with ``against`` where that is given.

    Always: the structure (as :func:`azquant.gguf.open_gguf` does, all shards of a split model), that the
    tensors are those its metadata promise where the architecture is known, that the vocabulary agrees with
    itself, and that every scale and every plain element is finite. ``hashes`` adds each tensor's SHA-256.

    ``against`` is another GGUF file, or a checkpoint as :func:`azquant.convert` takes it, whose tensors are
    renamed and turned as there. Each tensor with a decoder is compared in bands of about a million elements:
    root mean square and largest error, and the signal-to-noise ratio. Tensors that only one side has, or
    whose shapes differ, are problems; how large an error may be is for the caller to judge.

    ``progress(done, total)`` is told the bytes of tensors that were looked at.

    Raises what opening raises (InputFileError, GGUFError, CheckpointError, ConversionError, ...). What is
    wrong with a file that opens is in the report.
    """
    path = Path(path)
    source = None if against is None else Path(against)
    with ExitStack() as stack:
        file = stack.enter_context(open_gguf(path))
        references = None if source is None else open_references(source, stack)
        findings = Findings()
        check_file(file, findings)
        if references is not None:
            _check_names(file, references, findings)
        total = sum(tensor.nbytes for tensor in file.tensors.values())
        done = 0
        checks = []
        for tensor in file.tensors.values():
            if progress is not None:
                progress(done, total)
            reference = None if references is None else _reference(tensor.name, references, findings)
            checks.append(_check_tensor(tensor, file.has_data, reference, hashes, findings))
            done += tensor.nbytes
        if progress is not None:
            progress(done, total)
        return VerifyReport(path, source, tuple(checks), tuple(findings.problems), tuple(findings.notes))


def _check_names(file: GGUFFile, references: Mapping[str, Reference], findings: Findings) -> None:
    for name in references:
        if name not in file.tensors:
            findings.problem(f"tensor {name!r} of the source is missing")
    if not references.keys() & file.tensors.keys():
        raise ArgumentError(
            f"{file.path} and the source have no tensor in common: they are not the same model"
        )


def _reference(name: str, references: Mapping[str, Reference], findings: Findings) -> Reference | None:
    found = references.get(name)
    if found is None and name == Architecture.HEAD:
        found = references.get(Architecture.EMBEDDING)  # tied in the source, stored twice here
    if found is None:
        findings.problem(f"tensor {name!r} is not in the source")
    return found


# ---- a tensor ----------------------------------------------------------------------------------------


def _check_tensor(
    tensor: GGUFTensor, has_data: bool, reference: Reference | None, hashes: bool, findings: Findings
) -> TensorCheck:
    if has_data:
        count, first = count_not_finite(tensor.data, tensor.type)
        if count:
            what = "blocks have a scale that is" if tensor.type.is_quantized else "elements are"
            findings.problem(
                f"tensor {tensor.name!r}: {count} {what} not finite, the first is number {first} "
                f"(at byte {tensor.offset + first * tensor.type.block_bytes} of {tensor.path.name})"
            )
    errors, reproduced = None, None
    if reference is not None and has_data:
        if reference.shape != tensor.shape:
            findings.problem(
                f"tensor {tensor.name!r} has shape {tensor.shape}; in the source it has {reference.shape}"
            )
        else:
            errors, reproduced = _compare(tensor, reference, findings)
    return TensorCheck(
        tensor.name,
        tensor.shape,
        tensor.type.name,
        tensor.nbytes,
        tensor_sha256(tensor) if hashes and has_data else None,
        None if reference is None else reference.type_name,
        errors,
        reproduced,
    )


def _compare(
    tensor: GGUFTensor, reference: Reference, findings: Findings
) -> tuple[TensorErrors | None, bool | None]:
    kind = tensor.type
    if not (can_decode(kind) and reference.decodable):
        if reference.type_name == kind.name and reference.bytes_of is not None:
            if _same(tensor.data, reference.bytes_of):
                return TensorErrors(0.0, 0.0, -1, float("inf")), None
            findings.note(f"tensor {tensor.name!r} differs from the source, and {kind} has no decoder")
        else:
            other = kind.name if not can_decode(kind) else reference.type_name
            findings.note(f"tensor {tensor.name!r} was not compared: {other} has no decoder")
        return None, None
    sums = ErrorSums()
    data = tensor.data
    reproduced: bool | None = True if reference.exact and kind.can_quantize else None
    at = 0
    columns = tensor.shape[-1] if tensor.shape else 1
    for band in reference.bands():
        nbytes = band.size // kind.block_size * kind.block_bytes
        piece = data[at : at + nbytes]
        sums.add(decode(piece, kind), band)
        if reproduced:
            reproduced = _reproduces(piece, tensor, band, columns)
        at += nbytes
    errors = sums.result()
    if errors is None:
        findings.problem(f"tensor {tensor.name!r} or its source holds NaN or infinity: no error to give")
    return errors, reproduced


def _reproduces(piece: Any, tensor: GGUFTensor, band: Any, columns: int) -> bool | None:
    """Whether quantizing ``band`` gives ``piece``. Blocks know nothing of rows: a band may end in one."""
    width = columns if columns and band.size % columns == 0 else tensor.type.block_size
    if not band.size:
        return True
    try:
        rows = np.ascontiguousarray(band, np.float32).reshape(-1, width)
        return bool(np.array_equal(encode_rows(rows, tensor.type), piece))
    except NonFiniteError:
        return None


def _same(one: Any, other: Any) -> bool:
    return one.size == other.size and all(
        np.array_equal(one[at : at + _PIECE], other[at : at + _PIECE]) for at in range(0, one.size, _PIECE)
    )
