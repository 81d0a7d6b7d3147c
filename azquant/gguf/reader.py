"""Opening GGUF files: the header is checked, nothing is copied, values decode when they are asked for.

What is refused, and what is read though odd, stands in :mod:`azquant.gguf.header`.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.errors import ArgumentError, GGUFError, InputFileError
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.header import Entry, Header
from azquant.gguf.values import GGUFArray, Malformed, Value, ValueType, decode_value
from azquant.types import GGMLType

__all__ = ["GGUFFile", "GGUFTensor", "open_gguf"]


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file. It keeps the file mapped, also after the GGUFFile is closed."""

    name: str
    shape: tuple[int, ...]
    """In NumPy's order, outermost first; rows, the innermost, are what blocks lie along."""
    type: GGMLType
    offset: int
    """Where in the file the data begins, in bytes."""
    nbytes: int
    path: Path
    """The file the data lies in."""
    _file_bytes: npt.NDArray[np.uint8] = field(repr=False, compare=False)

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, a read-only view of the mapped file, in the file's byte order.

        Raises GGUFError if the file holds a header only.
        """
        stop = self.offset + self.nbytes
        if stop > self._file_bytes.size and self.nbytes:
            raise GGUFError(
                f"tensor {self.name!r} has no data: the file holds a header only",
                path=self.path,
                offset=self.offset,
            )
        return self._file_bytes[self.offset : stop]


class _Metadata(Mapping[str, Value]):
    """The keys in file order; a value is decoded each time it is asked for."""

    def __init__(self, buffer: memoryview, order: str, entries: dict[str, Entry]) -> None:
        self._buffer = buffer
        self._order = order
        self._entries = entries

    def __getitem__(self, key: str) -> Value:
        kind, start, stop = self._entries[key]
        return decode_value(self._buffer, start, stop, kind, self._order)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<metadata: {', '.join(self._entries)}>"

    def copy(self) -> dict[str, MetadataValue]:
        """Every key with its type and, from little-endian files, its very bytes."""
        copies = {}
        for key, (kind, start, stop) in self._entries.items():
            value = self[key]
            element_type = value.element_type if isinstance(value, GGUFArray) else None
            encoded = self._buffer[start:stop] if self._order == "<" else b""
            copies[key] = MetadataValue(kind, value, element_type, encoded)
        return copies


class GGUFFile:
    """An open GGUF file: made by :func:`open_gguf`, closed by :meth:`close` or the end of a ``with``.

    Metadata, tensors, arrays and views taken from it stay valid after it is closed: each keeps the file
    mapped. Cutting or overwriting the file in place meanwhile is undefined (replacing it is safe).
    """

    path: Path
    version: int
    """2 or 3."""
    byte_order: str
    """``"<"`` or ``">"``: the order of the header and of the tensors' data."""
    alignment: int
    """What the offsets of tensors are multiples of."""
    data_offset: int
    """Where the data section begins, in bytes."""
    size: int
    """Size of the file in bytes."""
    has_data: bool
    """False for a header-only file, whose tensors have no data."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.version = header.version
        self.byte_order = header.order
        self.alignment = header.alignment
        self.data_offset = header.data_offset
        self.size = header.end
        self.has_data = not header.is_header_only
        self._metadata: _Metadata | None = _Metadata(header.buffer, header.order, header.entries)
        self._tensors: Mapping[str, GGUFTensor] | None = MappingProxyType(_tensors(header, path))

    @property
    def metadata(self) -> Mapping[str, Value]:
        """Keys and values in file order: bool, int, float, str or GGUFArray.

        Bytes of a string that are not UTF-8 come as lone surrogates (``errors="surrogateescape"``). A bool
        stored as another byte than 0 or 1 is true.
        """
        return self._open_metadata()

    @property
    def metadata_types(self) -> Mapping[str, ValueType]:
        """The stored type of each key, in file order."""
        return {key: entry.kind for key, entry in self._open_metadata()._entries.items()}

    def copy_metadata(self) -> dict[str, MetadataValue]:
        """All metadata as :func:`write_gguf` takes it; from little-endian files byte for byte the same."""
        return self._open_metadata().copy()

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """The tensors by name, in file order."""
        if self._tensors is None:
            raise ArgumentError(f"{self.path} is closed")
        return self._tensors

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._tensors is None

    def close(self) -> None:
        """Let go of the file. It is unmapped when nothing taken from it is left."""
        self._metadata = None
        self._tensors = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._metadata is None or self._tensors is None:
            return f"<closed GGUF file {str(self.path)!r}>"
        return f"<GGUF file {str(self.path)!r}: {len(self._metadata)} keys, {len(self._tensors)} tensors>"

    def _open_metadata(self) -> _Metadata:
        if self._metadata is None:
            raise ArgumentError(f"{self.path} is closed")
        return self._metadata


def _tensors(header: Header, path: Path) -> dict[str, GGUFTensor]:
    file_bytes = np.frombuffer(header.buffer, np.uint8)
    return {
        name: GGUFTensor(
            name, info.shape, info.type, header.data_offset + info.offset, info.nbytes, path, file_bytes
        )
        for name, info in header.infos.items()
    }


def open_gguf(path: str | PathLike[str]) -> GGUFFile:
    """Open the GGUF file at ``path`` and check its whole header; see :mod:`azquant.gguf.header`.

    Raises InputFileError when there is no file that could be read, GGUFError (with the byte offset) when
    it breaks the format or was cut short.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Opening a pipe would wait for a writer.
            raise InputFileError(f"{path} is not a file" + (" but a folder" if path.is_dir() else ""))
        with path.open("rb") as file:
            return open_descriptor(file.fileno(), path)
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist") from None
    except InputFileError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, GGUFError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputFileError(f"{path} cannot be read: {reason}") from error


def open_descriptor(descriptor: int, path: Path) -> GGUFFile:
    """The same for a file that is already open. The descriptor may be closed afterwards."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        raise GGUFError("the file is empty", path=path, offset=0)
    # Never closed by hand: the views handed out keep it, and it goes when the last of them does.
    mapped: Any = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    try:
        return GGUFFile(path, Header(memoryview(mapped)))
    except Malformed as error:
        raise GGUFError(error.message, path=path, offset=error.offset) from None
