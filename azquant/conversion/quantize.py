"""From one GGUF file to another with fewer bits: llama-quantize's choices and bytes, band by band."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from azquant.conversion.imatrix import ImportanceMatrix, read_imatrix
from azquant.conversion.plan import block_warnings
from azquant.conversion.recipe import Choice, Model, Options, Target, Weight, choose_types, get_target
from azquant.conversion.report import ConversionReport, TensorRow
from azquant.cpu import num_threads
from azquant.errors import ArgumentError, ConversionError, ConversionWarning, NonFiniteError
from azquant.gguf import (
    GGUFFile,
    GGUFTensor,
    MetadataValue,
    Piece,
    TensorSpec,
    ValueType,
    check_output,
    keys,
    open_gguf,
)
from azquant.gguf.shards import SPLIT_KEYS, shard_paths
from azquant.gguf.split import write_shards
from azquant.gguf.writer import Layout
from azquant.ops import encode_rows
from azquant.tensor import QTensor
from azquant.types import GGMLType

__all__ = ["quantize_file"]

BAND_ELEMENTS = 1 << 21
"""Weights that a thread works on at a time: 8 MiB in float32."""

_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_PLAIN = ("f32", "f16", "bf16")
_NO_IMPORTANCE = (*_PLAIN, "q8_0", "mxfp4", "tq1_0", "tq2_0")  # types that take no notice of one
_NEVER_MEASURED = ("token_embd.weight", "output.weight")  # llama-imatrix leaves them out unless told


def quantize_file(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    type: str | GGMLType = "q4_0",
    *,
    imatrix: str | PathLike[str] | None = None,
    pure: bool = False,
    output_type: str | GGMLType | None = None,
    token_embedding_type: str | GGMLType | None = None,
    tensor_types: Sequence[tuple[str, str | GGMLType]] = (),
    allow_requantize: bool = False,
    strict: bool = False,
    nonfinite: str = "error",
    keep_split: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Quantize the GGUF file ``src`` to the GGUF file ``dst``: types and bytes are those of llama-quantize.

    ``type`` is a target (see :data:`azquant.conversion.recipe.TARGETS`): q4_0, q4_k_m, q8_0, f16, ... With
    ``pure`` every weight gets the target's own type; ``output_type`` and ``token_embedding_type`` set those
    tensors, ``tensor_types`` any tensor in whose name a regular expression is found (in capitals or not).
    ``imatrix`` is an importance matrix of llama-imatrix, GGUF or ``.dat``; a ConversionWarning says if it
    leaves tensors out.

    A tensor that has its new type already is copied. One of another quantized type is refused unless
    ``allow_requantize``; the key ``azquant.requantized_from`` then tells of it. Rows that no block fits give
    way to a type that fits, with a ConversionWarning; ``strict`` refuses. A NaN or infinity is an error, in
    copied tensors too; ``nonfinite="zero"`` makes zeros of them, counted in ``azquant.nonfinite_zeroed``,
    unless they stand in blocks.

    A split model (``src`` is its first shard) becomes one file; ``keep_split`` writes as many shards again,
    named after ``dst`` without its suffix: ``dst-00001-of-0000N.gguf``.

    ``dst`` appears whole or not at all: it gets its name when it is on the disk and was read back. Without
    ``verify`` (llama-quantize does neither) the system writes it to the disk when it likes, and a power cut
    soon after may leave a broken file. With ``dry_run`` nothing is written; the report tells the exact size.

    Raises InputFileError, GGUFError, FormatError (the importance matrix), ConversionError, NonFiniteError,
    ShapeError, ArgumentError, UnsupportedTypeError, OutputError.
    """
    target = get_target(type)
    if nonfinite not in ("error", "zero"):
        raise ArgumentError(f"nonfinite={nonfinite!r}: must be 'error' or 'zero'")
    source, destination = Path(src), Path(dst)
    if not keep_split:
        check_output(destination, overwrite=overwrite, sources=[source])
    importance = None if imatrix is None else read_imatrix(imatrix)
    options = Options.parse(
        pure=pure,
        output_type=output_type,
        token_embedding_type=token_embedding_type,
        tensor_types=tensor_types,
        has_imatrix=importance is not None,
    )
    with open_gguf(source) as file:
        weights = [Weight(t.name, t.shape, t.type) for t in file.tensors.values()]
        model = Model.from_metadata(file.metadata)
        choices = choose_types(weights, target, model, options)
        jobs = {
            tensor.name: _Job(
                tensor, choices[tensor.name], _importance_of(tensor, importance), nonfinite == "zero"
            )
            for tensor in file.tensors.values()
        }
        _check(jobs.values(), target, dry_run, allow_requantize, strict)
        said = block_warnings({name: choices[name] for name in jobs})
        if importance is not None:
            said += _measure_warnings(importance, jobs.values())
        for message in said:
            warnings.warn(message, ConversionWarning, stacklevel=2)
        metadata = _metadata(file, target, jobs.values(), importance, dry_run)
        groups, targets = [list(jobs.values())], [destination]
        if keep_split and len(file.paths) > 1:
            groups = [[job for job in jobs.values() if job.tensor.path == path] for path in file.paths]
            targets = shard_paths(destination.with_suffix(""), len(groups))
        layouts = _layouts(groups, metadata, file.alignment)
        size = sum(layout.total for layout in layouts)
        if not dry_run:
            write_shards(
                targets,
                layouts,
                lambda spec: jobs[spec.name].pieces(),
                sources=file.paths,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
                sync=verify,
                threads=num_threads(),
            )
        return ConversionReport(
            source=source,
            destination=targets[0],
            architecture=model.architecture,
            type=target.name,
            tensors=tuple(job.row() for job in jobs.values()),
            source_bytes=file.size,
            file_bytes=None if dry_run else size,
            planned_bytes=size,
            warnings=tuple(said),
            notes=(),
        )


@dataclass
class _Job:
    """One tensor on its way."""

    tensor: GGUFTensor
    choice: Choice
    importance: NDArray[np.float32] | None
    """(slices, columns); slices are experts, or one."""
    zero_nonfinite: bool

    @property
    def copied(self) -> bool:
        return self.tensor.type is self.choice.type

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns; a scalar has one of each."""
        *outer, columns = self.tensor.shape or (1,)
        return prod(outer), columns

    def row(self) -> TensorRow:
        """What the report says of it."""
        tensor, choice = self.tensor, self.choice
        nbytes = TensorSpec(tensor.name, tensor.shape, choice.type).nbytes
        return TensorRow(
            tensor.name, tensor.name, tensor.shape, tensor.type.name, choice.type.name, nbytes, choice.reason
        )

    def pieces(self) -> Iterator[Piece]:
        """The bytes of the new tensor, a few rows at a time."""
        if self.copied and not self.tensor.type.can_dequantize:
            for start in range(0, self.tensor.nbytes, 4 * BAND_ELEMENTS):
                stop = min(start + 4 * BAND_ELEMENTS, self.tensor.nbytes)
                yield Piece(stop - start, partial(self._copy, start, stop), stop - start)
            return
        rows, columns = self.size
        row_bytes = self.choice.type.row_bytes(columns)
        slices = 1 if self.copied or self.importance is None else len(self.importance)
        for i in range(slices):
            importance = None if self.importance is None else self.importance[i]
            for first, last in _bands(i * rows // slices, (i + 1) * rows // slices, columns):
                encode = partial(self._encode, first, last, importance)
                yield Piece((last - first) * row_bytes, encode, 8 * (last - first) * columns)

    def _copy(self, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        yield self.tensor.data[start:stop]
        self.tensor.release(start, stop)

    def _encode(
        self, first: int, last: int, importance: NDArray[np.float32] | None
    ) -> Iterator[NDArray[np.uint8]]:
        band = self._floats(first, last)
        start, stop = self._offset(first), self._offset(last)
        if self.copied and np.isfinite(band).all():
            yield self.tensor.data[start:stop]
        else:
            if self.tensor.type.name not in _PLAIN and self.copied:
                raise self._broken(band, first)
            if self.zero_nonfinite:
                band = _without_nonfinite(band)
            yield encode_rows(
                band, self.choice.type, importance=importance, tensor=self.tensor.name, first_row=first
            )
        self.tensor.release(start, stop)

    def _broken(self, band: NDArray[np.float32], first: int) -> NonFiniteError:
        """What is wrong with blocks that are copied, whose first row is ``first``."""
        row, column = divmod(int(np.argmin(np.isfinite(band))), band.shape[1])
        return NonFiniteError(
            f"tensor {self.tensor.name!r}: {float(band[row, column])} at row {first + row}, column {column}; "
            f"the {self.tensor.type} blocks of the source are broken",
            index=(first + row) * band.shape[1] + column,
            tensor=self.tensor.name,
        )

    def _offset(self, row: int) -> int:
        return row * self.tensor.type.row_bytes(self.size[1])

    def _floats(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows in float32, F32 seen in place."""
        columns = self.size[1]
        data = self.tensor.data[self._offset(first) : self._offset(last)]
        if self.tensor.type.name == "f32" and data.ctypes.data % 4 == 0:
            return data.view("<f4").reshape(last - first, columns)
        return QTensor(data, (last - first, columns), self.tensor.type).dequantize()

    def count_nonfinite(self) -> int:
        """How many of its weights are NaN or infinite."""
        rows, columns = self.size
        return sum(
            int((~np.isfinite(self._floats(first, last))).sum()) for first, last in _bands(0, rows, columns)
        )


def _bands(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows ``start`` to ``stop``, cut into what is worked on at a time."""
    step = max(1, BAND_ELEMENTS // max(1, columns))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _without_nonfinite(band: NDArray[np.float32]) -> NDArray[np.float32]:
    return band if np.isfinite(band).all() else np.where(np.isfinite(band), band, np.float32(0))


def _importance_of(tensor: GGUFTensor, matrix: ImportanceMatrix | None) -> NDArray[np.float32] | None:
    """The importances of one tensor, (experts, columns); ``None`` where the matrix says nothing of it."""
    values = None if matrix is None else matrix.tensors.get(tensor.name)
    if matrix is None or values is None or len(tensor.shape) < 2:
        return None
    slices = tensor.shape[-3] if len(tensor.shape) > 2 else 1
    if values.size != slices * tensor.shape[-1]:
        if tensor.name == "token_embd.weight":  # measured as the head, perhaps
            return None
        raise ConversionError(
            f"{matrix.path}: {tensor.name} has {values.size} importances, but {slices} x {tensor.shape[-1]} "
            "columns; the importance matrix is of another model"
        )
    return np.ascontiguousarray(values.reshape(slices, tensor.shape[-1]))


def _check(
    jobs: Collection[_Job], target: Target, dry_run: bool, allow_requantize: bool, strict: bool
) -> None:
    for job in jobs:
        tensor, choice = job.tensor, job.choice
        if choice.fallback and strict:
            raise ConversionError(
                f"tensor {tensor.name}: {choice.reason}; without strict it becomes {choice.type}"
            )
        if job.copied:
            continue
        if not tensor.type.can_dequantize:
            raise ConversionError(
                f"tensor {tensor.name} is {tensor.type}, which holds no weights to quantize"
            )
        if tensor.type.name not in _PLAIN and not allow_requantize:
            raise ConversionError(
                f"tensor {tensor.name} is {tensor.type} already; quantizing it again loses more than "
                "quantizing the original would. Use the original file, or allow it (allow_requantize, "
                "--allow-requantize)"
            )
        unmeasured = job.importance is None and tensor.name not in _NEVER_MEASURED
        if target.name == "q2_k_s" and choice.type.name == "q2_k" and unmeasured and not dry_run:
            raise ConversionError(
                f"tensor {tensor.name}: q2_k_s needs an importance matrix (imatrix, --imatrix)"
            )


def _measure_warnings(importance: ImportanceMatrix, jobs: Collection[_Job]) -> list[str]:
    """What is to be said of an importance matrix that leaves out what it could have helped."""
    asking = [job for job in jobs if not job.copied and job.choice.type.name not in _NO_IMPORTANCE]
    without = [
        job.tensor.name for job in asking if job.importance is None and job.tensor.name not in _NEVER_MEASURED
    ]
    if not without:
        return []
    return [
        f"{importance.path.name} says nothing of {len(without)} of the {len(asking)} tensors that could use "
        f"an importance ({without[0]}{', ...' if len(without) > 1 else ''}): quantized without"
    ]


def _layouts(
    groups: Sequence[Sequence[_Job]], metadata: Mapping[str, MetadataValue], alignment: int
) -> list[Layout]:
    """The files to be written: one, or shards, the first of which has the metadata."""
    count = sum(map(len, groups))
    layouts = []
    for number, group in enumerate(groups):
        found = dict(metadata) if number == 0 else {}
        if len(groups) > 1:
            found[keys.SPLIT_NO] = keys.u16(number)
            found[keys.SPLIT_COUNT] = keys.u16(len(groups))
            found[keys.SPLIT_TENSORS_COUNT] = keys.i32(count)
        specs = [TensorSpec(job.tensor.name, job.tensor.shape, job.choice.type) for job in group]
        layouts.append(Layout(found, specs, alignment))
    return layouts


def _metadata(
    file: GGUFFile, target: Target, jobs: Collection[_Job], importance: ImportanceMatrix | None, dry_run: bool
) -> Mapping[str, MetadataValue]:
    metadata = {key: value for key, value in file.copy_metadata().items() if key not in SPLIT_KEYS}
    metadata[keys.QUANTIZATION_VERSION] = keys.u32(_QUANTIZATION_VERSION)
    metadata[keys.FILE_TYPE] = keys.u32(target.file_type)
    if importance is not None:
        metadata |= importance.metadata()
    work = [job for job in jobs if not job.copied]
    again = sorted({job.tensor.type.name for job in work if job.tensor.type.name not in _PLAIN})
    if again:
        metadata["azquant.requantized_from"] = keys.array(ValueType.STRING, again)
    if any(job.zero_nonfinite for job in jobs):
        count = 0 if dry_run else sum(job.count_nonfinite() for job in jobs)
        metadata["azquant.nonfinite_zeroed"] = keys.u64(count)
    return metadata
