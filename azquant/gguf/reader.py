"""Opening GGUF files: the header is checked, nothing is copied, values decode when they are asked for.

What is refused, and what is read though odd, stands in :mod:`azquant.gguf.header`; how several files
become one model, in :mod:`azquant.gguf.shards`.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from azquant._lazy import np
from azquant._pages import drop_range
from azquant.errors import ArgumentError, GGUFError, InputFileError, UnsupportedTypeError
from azquant.gguf.byteorder import swapped
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.header import Entry, Header
from azquant.gguf.shards import SPLIT_KEYS, check_shard, check_total, place_of, shard_paths, shard_prefix
from azquant.gguf.values import GGUFArray, Malformed, Value, ValueType, decode_value
from azquant.types import GGMLType

if TYPE_CHECKING:
    import numpy.typing as npt

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
    _file: memoryview = field(repr=False, compare=False)
    _order: str = field(default="<", repr=False, compare=False)

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as little-endian files hold them: uint8, (nbytes,).

        A read-only view of the mapped file; from a big-endian file a new array, made each time.

        Raises GGUFError if the file holds a header only, UnsupportedTypeError for some types in big-endian
        files.
        """
        if self._order == "<":
            return self.raw
        try:
            return swapped(self.raw, self.type)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{self.path}: tensor {self.name!r}: {error}") from None

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """The bytes in the file, whatever its byte order: a read-only view, uint8, (nbytes,).

        Raises GGUFError if the file holds a header only.
        """
        return np.frombuffer(self._file, np.uint8)[self.offset : self._end()]

    @property
    def buffer(self) -> memoryview:
        """What :attr:`data` holds, as a view of bytes that needs no NumPy where nothing has to be swapped."""
        return self._file[self.offset : self._end()] if self._order == "<" else self.data.data

    def _end(self) -> int:
        stop = self.offset + self.nbytes
        if stop > self._file.nbytes and self.nbytes:
            raise GGUFError(
                f"tensor {self.name!r} has no data: the file holds a header only",
                path=self.path,
                offset=self.offset,
            )
        return stop

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Tells the system that bytes ``start`` to ``stop`` of the data will not be read again soon.

        They count no longer as this process's memory; reading them again is allowed, only slower.
        """
        first = self.offset + start
        last = self.offset + (self.nbytes if stop is None else min(stop, self.nbytes))
        drop_range(self._file.obj, first, last)


class _Metadata(Mapping[str, Value]):
    """The keys in file order; a value is decoded each time it is asked for."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._entries: dict[str, tuple[Header, Entry]] = {}
        for header in headers:
            for key, entry in header.entries.items():
                if len(headers) == 1 or key not in SPLIT_KEYS:
                    self._entries.setdefault(key, (header, entry))

    def __getitem__(self, key: str) -> Value:
        header, (kind, start, stop) = self._entries[key]
        return decode_value(header.buffer, start, stop, kind, header.order)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<metadata: {', '.join(self._entries)}>"

    def types(self) -> dict[str, ValueType]:
        """The stored type of each key."""
        return {key: entry.kind for key, (_, entry) in self._entries.items()}

    def copy(self) -> dict[str, MetadataValue]:
        """Every key with its type and, from little-endian files, its very bytes."""
        copies = {}
        for key, (header, (kind, start, stop)) in self._entries.items():
            value = self[key]
            element_type = value.element_type if isinstance(value, GGUFArray) else None
            encoded = header.buffer[start:stop] if header.order == "<" else b""
            copies[key] = MetadataValue(kind, value, element_type, encoded)
        return copies


class GGUFFile:
    """An open GGUF file: made by :func:`open_gguf`, closed by :meth:`close` or the end of a ``with``.

    A model split over several files is one GGUFFile; what is said of "the file" is then the first's. Its
    metadata are without the keys that say how it was cut, so that they may be written to a single file.

    Metadata, tensors, arrays and views taken from it stay valid after it is closed: each keeps the file
    mapped. Cutting or overwriting the file in place meanwhile is undefined (replacing it is safe).
    """

    path: Path
    paths: tuple[Path, ...]
    """All files: ``path``, or the shards of a split model in order."""
    version: int
    """2 or 3."""
    byte_order: str
    """``"<"`` or ``">"``: the order of the header and of what tensors hold."""
    alignment: int
    """What the offsets of tensors are multiples of."""
    data_offset: int
    """Where the data section begins, in bytes."""
    size: int
    """Size in bytes, of all files together."""
    has_data: bool
    """False for a header-only file, whose tensors have no data."""

    def __init__(self, paths: Sequence[Path], headers: Sequence[Header]) -> None:
        first = headers[0]
        self.path = paths[0]
        self.paths = tuple(paths)
        self.version = first.version
        self.byte_order = first.order
        self.alignment = first.alignment
        self.data_offset = first.data_offset
        self.size = sum(header.end for header in headers)
        self.has_data = not any(header.is_header_only for header in headers)
        self._metadata: _Metadata | None = _Metadata(headers)
        tensors: dict[str, GGUFTensor] = {}
        for path, header in zip(paths, headers, strict=True):
            tensors.update(_tensors(header, path))
        self._tensors: Mapping[str, GGUFTensor] | None = MappingProxyType(tensors)

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
        return self._open_metadata().types()

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
    start, order = header.data_offset, header.order
    return {
        name: GGUFTensor(
            name, info.shape, info.type, start + info.offset, info.nbytes, path, header.buffer, order
        )
        for name, info in header.infos.items()
    }


def open_gguf(path: str | PathLike[str], *, join: bool = True) -> GGUFFile:
    """Open the GGUF file at ``path`` and check its whole header; see :mod:`azquant.gguf.header`.

    The first shard of a split model opens with all others, which must lie beside it under their names.
    ``join=False`` opens any shard as a file of its own.

    Raises InputFileError when there is no file that could be read, or a shard is missing; GGUFError (with the
    byte offset) when it breaks the format, was cut short, is a later shard, or contradicts the other shards.
    """
    path = Path(path)
    header = _open_header(path)
    if not join:
        return GGUFFile((path,), (header,))
    with _located(path):
        place = place_of(header)
        if place is None:
            return GGUFFile((path,), (header,))
        prefix = shard_prefix(path, place)
        if prefix is None:
            raise Malformed(
                f"this is shard {place.number + 1} of {place.shards}, but it is not named "
                f"...-{place.number + 1:05}-of-{place.shards:05}.gguf: the others cannot be found",
                header.entries[SPLIT_KEYS[0]].start,
            )
        paths = shard_paths(prefix, place.shards)
        if place.number:
            raise Malformed(
                f"this is shard {place.number + 1} of {place.shards}; open the first, {paths[0].name}",
                header.entries[SPLIT_KEYS[0]].start,
            )
    headers = [header]
    names = set(header.infos)
    for number, other in enumerate(paths[1:], start=1):
        try:
            shard = _open_header(other)
        except InputFileError as error:
            raise InputFileError(f"shard {number + 1} of {place.shards} of {path}: {error}") from error
        with _located(other):
            check_shard(shard, number, header, names)
        headers.append(shard)
    with _located(path):
        check_total(headers)
    return GGUFFile(paths, headers)


def open_descriptor(descriptor: int, path: Path) -> GGUFFile:
    """A file that is already open, as a file of its own. The descriptor may be closed afterwards."""
    return GGUFFile((path,), (_map_header(descriptor, path),))


def _open_header(path: Path) -> Header:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Opening a pipe would wait for a writer.
            raise InputFileError(f"{path} is not a file" + (" but a folder" if path.is_dir() else ""))
        with path.open("rb") as file:
            return _map_header(file.fileno(), path)
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist") from None
    except InputFileError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, GGUFError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputFileError(f"{path} cannot be read: {reason}") from error


def _map_header(descriptor: int, path: Path) -> Header:
    size = os.fstat(descriptor).st_size
    if size == 0:
        raise GGUFError("the file is empty", path=path, offset=0)
    # Never closed by hand: the views handed out keep it, and it goes when the last of them does.
    mapped: Any = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    try:
        return Header(memoryview(mapped))
    except Malformed as error:
        raise GGUFError(error.message, path=path, offset=error.offset) from None


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Malformed becomes a GGUFError of ``path``."""
    try:
        yield
    except Malformed as error:
        raise GGUFError(error.message, path=path, offset=error.offset) from None
