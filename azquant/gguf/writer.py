"""Writing GGUF files: sized and checked before the first byte, streamed, verified, and whole or not there.

Files are version 3, little-endian; see :mod:`azquant.gguf.reader` for the layout. Each tensor begins at a
multiple of the alignment and the last is padded too, which older readers rely on.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any, TypeAlias

from azquant.errors import ArgumentError, ShapeError
from azquant.gguf import keys
from azquant.gguf.atomic import AtomicFile
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.fill import fill
from azquant.gguf.header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NAME_BYTES,
    MAX_SIZE,
    MAX_TENSORS,
)
from azquant.types import GGMLType, get_type

__all__ = ["Layout", "TensorSpec", "write_gguf"]

_VERSION = 3

Progress: TypeAlias = Callable[[int, int], None]
"""Told (bytes done, bytes in all) now and then."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be: ``shape`` in NumPy's order (outermost first), ``type`` a GGMLType or its name.

    Raises ShapeError for an impossible shape, or rows that are no whole number of the type's blocks.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    def __post_init__(self) -> None:
        try:
            shape = tuple(operator.index(d) for d in self.shape)
        except TypeError:
            raise ShapeError(f"tensor {self.name!r}: {self.shape!r} is no shape") from None
        if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or prod(d or 1 for d in shape) > MAX_SIZE:
            raise ShapeError(
                f"tensor {self.name!r}: shape {shape} does not fit GGUF (4 dimensions, 2^63-1 elements)"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "type", get_type(self.type))
        try:
            self.type.row_bytes(shape[-1] if shape else 1)
        except ShapeError as error:
            raise ShapeError(f"tensor {self.name!r}: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) // self.type.block_size * self.type.block_bytes


Data: TypeAlias = Callable[[TensorSpec], Iterable[Any]]
"""Gives a tensor's bytes, in as many buffers, or pieces still to be made, as it likes."""


def write_gguf(
    path: str | PathLike[str],
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[TensorSpec],
    data: Data,
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    overwrite: bool = False,
    sources: Iterable[str | PathLike[str]] = (),
    verify: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
    late: Callable[[], Mapping[str, MetadataValue]] | None = None,
) -> None:
    """Write a GGUF file of ``metadata`` and ``tensors``, in their order.

    ``data(spec)`` is called once for each tensor that is not empty, in order, and yields its bytes in as
    many buffers as it likes (bytes, memoryview, C-contiguous arrays of any dtype); one at a time is held.
    It may yield a :class:`Piece` instead, whose bytes one of ``threads`` threads makes and writes.
    ``sources`` are files that are read meanwhile and which the output must therefore not be.
    ``verify`` reads everything back from the disk and compares it before the file gets its name.
    ``progress(done, total)`` is told the bytes of the file written so far. ``late()``, asked after the data,
    gives the metadata again with values that were not known before; they must take the same bytes.

    An alignment other than 32 is recorded as ``general.alignment`` where ``metadata`` does not do so.

    Raises OutputError when the file cannot be written, ArgumentError and ShapeError for metadata, tensors or
    data that cannot be stored; whatever ``data`` raises passes through. In every case, and if the process is
    killed, what stood at ``path`` is untouched and no partial file remains.
    """
    layout = Layout(metadata, tensors, alignment)
    with AtomicFile(path, layout.total, overwrite=overwrite, sources=sources) as output:
        final = None if late is None else lambda: Layout(late(), tensors, alignment)
        fill(output, layout, data, verify=verify, threads=threads, progress=progress, late=final)
        output.publish()


class Layout:
    """A file to be written, checked and sized: everything but the tensors' data."""

    def __init__(
        self, metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorSpec], alignment: int
    ) -> None:
        self.specs = tuple(tensors)
        self.alignment = alignment
        self.header = _header(metadata, self.specs, alignment)
        self.total = len(self.header) + sum(_padded(spec.nbytes, alignment) for spec in self.specs)
        if self.total > MAX_SIZE:
            raise ArgumentError(f"the tensors take {self.total} bytes together, more than a file can have")


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _header(metadata: Mapping[str, MetadataValue], specs: Sequence[TensorSpec], alignment: int) -> bytes:
    """Everything before the data, padding included."""
    metadata = _with_alignment(metadata, alignment)
    if len(metadata) > MAX_KEYS or len(specs) > MAX_TENSORS:
        raise ArgumentError(
            f"{len(metadata)} keys and {len(specs)} tensors; the most are {MAX_KEYS} and {MAX_TENSORS}"
        )
    parts: list[bytes | memoryview] = [struct.pack("<4sIQQ", MAGIC, _VERSION, len(specs), len(metadata))]
    for key, value in metadata.items():
        if not isinstance(value, MetadataValue):
            raise ArgumentError(
                f"key {key!r}: {type(value).__name__} is no MetadataValue; see azquant.gguf.keys"
            )
        parts += [_name(key, "key", MAX_KEY_BYTES), struct.pack("<I", value.type), value.encoded]
    names: set[str] = set()
    offset = 0
    for spec in specs:
        if spec.name in names:
            raise ArgumentError(f"two tensors are named {spec.name!r}")
        names.add(spec.name)
        dimensions = spec.shape[::-1]
        parts.append(_name(spec.name, "tensor name", MAX_NAME_BYTES))
        parts.append(
            struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, spec.type.id, offset)
        )
        offset += _padded(spec.nbytes, alignment)
        if offset > MAX_SIZE:
            raise ArgumentError(f"the tensors up to {spec.name!r} take more bytes than a file can have")
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _with_alignment(metadata: Mapping[str, MetadataValue], alignment: int) -> Mapping[str, MetadataValue]:
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ArgumentError(f"the alignment {alignment!r} is no power of two from 8 to {MAX_ALIGNMENT}")
    wanted = keys.u32(alignment)
    stated = metadata.get(keys.ALIGNMENT)
    if stated is None:
        return metadata if alignment == DEFAULT_ALIGNMENT else {**metadata, keys.ALIGNMENT: wanted}
    if stated != wanted:
        raise ArgumentError(f"the metadata say {stated} of {keys.ALIGNMENT}; the file is to have {wanted}")
    return metadata


def _name(name: Any, what: str, limit: int) -> bytes:
    if not isinstance(name, str):
        raise ArgumentError(f"the {what} {name!r} is no str")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"the {what} {name!r} cannot be written as UTF-8") from None
    if not 0 < len(encoded) <= limit or 0 in encoded:
        raise ArgumentError(
            f"the {what} {name[:80]!r} has {len(encoded)} bytes; 1 to {limit} are possible, without NUL"
        )
    return struct.pack("<Q", len(encoded)) + encoded
