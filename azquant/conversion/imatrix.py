"""Importance matrices: how much an error in each column of each tensor counts, as llama-imatrix measures it.

Two formats are read: GGUF (:mod:`azquant.imatrix`) and the older ``.dat``, little-endian: a count of
entries, for each the name, a count of calls, and the float32 values times that count; then optionally the
chunks and the dataset's name. Source: imatrix-loader.cpp of llama.cpp.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from azquant import imatrix
from azquant.errors import FormatError, InputFileError
from azquant.gguf import MetadataValue, keys

__all__ = ["ImportanceMatrix", "read_imatrix"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importances of a model's tensors."""

    path: Path
    tensors: dict[str, Floats]
    """By tensor name: (experts * columns,)."""
    dataset: str = ""
    chunks: int = 0

    def metadata(self) -> dict[str, MetadataValue]:
        """The keys that say a file was quantized with it."""
        found = {"quantize.imatrix.file": keys.string(self.path.name)}
        if self.dataset:
            found["quantize.imatrix.dataset"] = keys.string(self.dataset)
        found["quantize.imatrix.entries_count"] = keys.u32(len(self.tensors))
        if self.chunks > 0:
            found["quantize.imatrix.chunks_count"] = keys.u32(self.chunks)
        return found


def read_imatrix(path: str | PathLike[str]) -> ImportanceMatrix:
    """Read an importance matrix of either format.

    Raises InputFileError when the file cannot be read, FormatError (GGUFError for a GGUF file) when it is
    neither, was cut short, or holds a number that is not finite or is negative.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}") from error
    found = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)
    if not found.tensors:
        raise FormatError("the importance matrix has no entries", path=path)
    for name, values in found.tensors.items():
        bad = np.flatnonzero(~((values >= 0) & np.isfinite(values)))
        if bad.size:
            raise FormatError(
                f"the importance of {name}, column {bad[0]} is {values[bad[0]]}; such an importance matrix "
                "cannot be used, measure it again",
                path=path,
            )
    return found


def _read_gguf(path: Path) -> ImportanceMatrix:
    read = imatrix.read_imatrix(path)
    tensors = {}
    for name in read.sums:
        importance = read.importance(name)
        assert importance is not None
        tensors[name] = importance.astype(np.float32).reshape(-1)
    return ImportanceMatrix(path, tensors, next(iter(read.datasets), ""), read.chunk_count)


class _Reader:
    """Little-endian numbers and strings, never past the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.data = path.read_bytes()

    def take(self, size: int, what: str) -> bytes:
        if size < 0 or size > len(self.data) - self.at:
            raise FormatError(
                f"neither a GGUF file nor an importance matrix: {what} of {size} bytes does not fit",
                path=self.path,
                offset=self.at,
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        return value


def _read_legacy(path: Path) -> ImportanceMatrix:
    reader = _Reader(path)
    tensors: dict[str, Floats] = {}
    for _ in range(reader.number("the number of entries")):
        name = reader.take(reader.number("a name's length"), "a name").decode("utf-8", "replace")
        calls = reader.number("a count")
        values = reader.number("a count")
        if values < 1:
            raise FormatError(f"entry {name!r} has {values} values", path=path, offset=reader.at)
        numbers = np.frombuffer(reader.take(4 * values, f"the values of {name!r}"), "<f4").astype(np.float32)
        tensors[name] = numbers / np.float32(calls) if calls > 0 else numbers
    chunks, dataset = 0, ""
    if reader.at < len(reader.data):
        chunks = reader.number("the number of chunks")
        if reader.at < len(reader.data):
            length = reader.number("the dataset's name")
            dataset = reader.take(length, "the dataset's name").decode("utf-8", "replace")
    return ImportanceMatrix(path, tensors, dataset, chunks)
