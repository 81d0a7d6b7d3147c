"""Importance matrices: how strongly each input column of a model's matrices is used.

The file is llama.cpp's: a GGUF file of ``general.type`` "imatrix" with two F32 tensors for each matrix,
``<name>.in_sum2``, the sums of the squared activations of each column, and ``<name>.counts``, the rows that
were summed (llama.cpp pull request 9400). llama-quantize and llama-imatrix read it, and this reads theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.errors import GGUFError
from azquant.gguf import TensorSpec, ValueType, keys, open_gguf, write_gguf
from azquant.types import get_type

__all__ = ["Imatrix", "read_imatrix", "write_imatrix"]

Doubles = npt.NDArray[np.float64]

KIND = "imatrix"
DATASETS = "imatrix.datasets"
CHUNK_COUNT = "imatrix.chunk_count"
CHUNK_SIZE = "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass
class Imatrix:
    """Sums of squared activations by GGUF tensor name."""

    sums: dict[str, Doubles] = field(default_factory=dict)
    """Name -> (columns,) or, for stacked experts, (experts, columns)."""
    counts: dict[str, Doubles] = field(default_factory=dict)
    """Name -> rows summed: a 0-d array, or (experts,)."""
    datasets: tuple[str, ...] = ()
    """What text it was computed on."""
    chunk_count: int = 0
    chunk_size: int = 0
    """Tokens of a chunk."""

    def importance(self, name: str) -> Doubles | None:
        """Mean squared activation of each column, in the shape of ``sums[name]``; ``None`` when not known.

        1 for an expert that was never used: nothing is known of it, so no column is preferred.
        """
        if name not in self.sums:
            return None
        count = self.counts[name][..., None]
        return np.where(count > 0, self.sums[name] / np.where(count > 0, count, 1), 1.0)


def write_imatrix(
    path: str | PathLike[str],
    imatrix: Imatrix,
    *,
    overwrite: bool = False,
    sources: Iterable[str | PathLike[str]] = (),
) -> None:
    """Write ``imatrix`` as a GGUF file, whole or not at all.

    ``sources`` are files that are read meanwhile. Raises OutputError, ArgumentError.
    """
    metadata = {
        keys.TYPE: keys.string(KIND),
        DATASETS: keys.array(ValueType.STRING, list(imatrix.datasets)),
        CHUNK_COUNT: keys.u32(imatrix.chunk_count),
        CHUNK_SIZE: keys.u32(imatrix.chunk_size),
    }
    arrays: dict[str, Any] = {}
    for name in sorted(imatrix.sums):
        arrays[name + _SUMS] = np.asarray(imatrix.sums[name], dtype="<f4")
        counts = np.asarray(imatrix.counts[name], dtype="<f4")
        arrays[name + _COUNTS] = counts.reshape(1) if counts.ndim == 0 else counts.reshape(-1, 1)
    specs = [TensorSpec(name, array.shape, get_type("f32")) for name, array in arrays.items()]
    write_gguf(
        path,
        metadata,
        specs,
        lambda spec: [np.ascontiguousarray(arrays[spec.name])],
        overwrite=overwrite,
        sources=sources,
    )


def read_imatrix(path: str | PathLike[str]) -> Imatrix:
    """Read an importance matrix in GGUF form. Raises InputFileError, GGUFError.

    The older form (``.dat``) is not read; ``llama-imatrix --in-file old.dat -o new.gguf`` turns it into this.
    """
    with open_gguf(path) as file:
        metadata: Mapping[str, Any] = file.metadata
        if metadata.get(keys.TYPE) != KIND:
            raise GGUFError(f"{keys.TYPE} is not {KIND!r}: this is no importance matrix", path=Path(path))
        imatrix = Imatrix(
            datasets=_strings(metadata.get(DATASETS)),
            chunk_count=_count(metadata.get(CHUNK_COUNT)),
            chunk_size=_count(metadata.get(CHUNK_SIZE)),
        )
        tensors = file.tensors
        for full_name, tensor in tensors.items():
            if not full_name.endswith(_SUMS):
                continue
            name = full_name.removesuffix(_SUMS)
            counts = tensors.get(name + _COUNTS)
            if counts is None:
                raise GGUFError(f"tensor {name}{_COUNTS} is missing", path=Path(path))
            sums, rows = _values(tensor, path), _values(counts, path).reshape(-1)
            if sums.ndim not in (1, 2) or rows.size != (1 if sums.ndim == 1 else len(sums)):
                raise GGUFError(
                    f"tensor {full_name} has shape {sums.shape}, {rows.size} counts do not fit it",
                    path=Path(path),
                )
            one = rows.size == 1
            imatrix.sums[name] = sums.reshape(-1) if one else sums
            imatrix.counts[name] = rows.reshape(()) if one else rows
    return imatrix


def _values(tensor: Any, path: str | PathLike[str]) -> Doubles:
    if tensor.type != get_type("f32"):
        raise GGUFError(f"tensor {tensor.name} is {tensor.type}, not f32", path=Path(path))
    values: Doubles = np.frombuffer(tensor.data, dtype="<f4").astype(np.float64).reshape(tensor.shape)
    if not np.isfinite(values).all() or (values < 0).any():
        raise GGUFError(f"tensor {tensor.name} holds a negative number, NaN or infinity", path=Path(path))
    return values


def _strings(value: Any) -> tuple[str, ...]:
    items: Any = value.tolist() if hasattr(value, "tolist") else value
    return tuple(items) if isinstance(items, Sequence) and not isinstance(items, str) else ()


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
