"""GGUF metadata values as they lie in a file: their types, their extent, and arrays that decode on demand.

A value is a number, a bool (one byte), a string (uint64 length, then UTF-8 bytes without a terminator) or
an array (uint32 element type, uint64 count, then the elements without padding). Arrays may nest.

Nothing here trusts the file: a length is compared with the bytes that remain before it is used, and
:func:`skip_value` has walked over every array before a :class:`GGUFArray` of it is handed out.

Source: the GGUF specification (docs/gguf.md of ggml).
"""

from __future__ import annotations

import operator
import struct
import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from azquant._lazy import np
from azquant.errors import GGUFError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["MAX_DEPTH", "GGUFArray", "Malformed", "Value", "ValueType", "decode_value", "skip_value"]

MAX_DEPTH = 8
"""Arrays within arrays that are followed. ggml itself writes none."""

ARRAY_HEAD = 12
"""Bytes before an array's first element: element type and count."""


class ValueType(IntEnum):
    """The types of metadata values, with the numbers that stand for them in a file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def size(self) -> int | None:
        """Bytes of one value, ``None`` for strings and arrays."""
        letter = LETTERS.get(self)
        return None if letter is None else struct.calcsize("<" + letter)


# The struct letter of each type of fixed size, which NumPy shares. A bool is read as its byte, so that
# files holding other bytes than 0 and 1 (ggml writes and reads such) open; any but 0 is true, as in C.
LETTERS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
STRUCTS = {order + letter: struct.Struct(order + letter) for order in "<>" for letter in "bBhHiIqQfd"}
_ARRAY_HEADS = {order: struct.Struct(order + "IQ") for order in "<>"}
_SIZES = {kind: struct.calcsize("<" + letter) for kind, letter in LETTERS.items()}
# The fewest bytes an element can take: what a count is checked with before anything is walked or made.
_LEAST = {**_SIZES, ValueType.STRING: 8, ValueType.ARRAY: ARRAY_HEAD}
_KINDS = {int(kind): kind for kind in ValueType}


_DECODED_TOGETHER = 4096
"""Strings of an array: enough to be quick, and few enough to stay in the cache."""


_MANY = 64
"""Strings from which on they are decoded together."""


class Malformed(Exception):
    """Bytes that break the format. Internal: the caller, who knows the path, makes a GGUFError of it."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


def value_type(number: int, offset: int) -> ValueType:
    """The type numbered ``number``, which was read at byte ``offset``."""
    kind = _KINDS.get(number)
    if kind is None:
        raise Malformed(f"unknown value type {number}; GGUF has 0 to {max(_KINDS)}", offset)
    return kind


def _skip_strings(
    buffer: memoryview,
    offset: int,
    count: int,
    order: str,
    end: int,
    starts: npt.NDArray[np.int64] | None = None,
) -> int:
    """The byte after ``count`` strings that start at ``offset``; ``~at`` if the one at ``at`` passes ``end``.

    The loop that opening a large vocabulary spends its time in, and therefore the kernels' own.
    """
    if starts is None and count <= 1:  # most strings are values, not items
        if not count:
            return offset
        if end - offset < 8:
            return ~offset
        stop: int = offset + 8 + STRUCTS[order + "Q"].unpack_from(buffer, offset)[0]
        return stop if stop <= end else ~offset
    from azquant._backend import kernels

    found: int = kernels().scan_strings(buffer, offset, count, order, end, starts)
    return found


def _array_head(buffer: memoryview, offset: int, order: str, end: int) -> tuple[ValueType, int]:
    """Element type and count of the array at ``offset``, the count possible in the bytes that remain."""
    if end - offset < ARRAY_HEAD:
        raise Malformed("the file ends inside an array's type and count", offset)
    number, count = _ARRAY_HEADS[order].unpack_from(buffer, offset)
    kind = value_type(number, offset)
    remaining = end - offset - ARRAY_HEAD
    if count * _LEAST[kind] > remaining:
        raise Malformed(
            f"an array of {count} {kind.name} needs at least {count * _LEAST[kind]} bytes; "
            f"{remaining} remain",
            offset + 4,
        )
    return kind, count


def _skip_array(buffer: memoryview, offset: int, order: str, end: int, depth: int) -> int:
    kind, count = _array_head(buffer, offset, order, end)
    start = offset + ARRAY_HEAD
    size = _SIZES.get(kind)
    if size is not None:
        return start + size * count
    if kind is ValueType.STRING:
        stop = _skip_strings(buffer, start, count, order, end)
        if stop < 0:
            raise Malformed("a string of the array runs past the end of the file", ~stop)
        return stop
    if depth >= MAX_DEPTH:
        raise Malformed(f"arrays nest deeper than {MAX_DEPTH}", offset)
    for _ in range(count):
        start = _skip_array(buffer, start, order, end, depth + 1)
    return start


def skip_value(buffer: memoryview, offset: int, kind: ValueType, order: str, end: int) -> int:
    """The byte after the value at ``offset``. Raises Malformed if any part of it is not there."""
    if kind is ValueType.ARRAY:
        return _skip_array(buffer, offset, order, end, 1)
    if kind is ValueType.STRING:
        stop = _skip_strings(buffer, offset, 1, order, end)
        if stop < 0:
            raise Malformed("a string runs past the end of the file", offset)
        return stop
    stop = offset + _SIZES[kind]
    if stop > end:
        raise Malformed(f"the file ends inside a {kind.name} value", offset)
    return stop


def decode_value(buffer: memoryview, start: int, stop: int, kind: ValueType, order: str) -> Value:
    """The value in bytes ``start`` to ``stop``, which :func:`skip_value` has found to be whole.

    Bytes of a string that are not UTF-8 become lone surrogates (``errors="surrogateescape"``), which the
    writer turns back into the same bytes.
    """
    if kind is ValueType.STRING:
        return str(buffer[start + 8 : stop], "utf-8", "surrogateescape")
    if kind is ValueType.ARRAY:
        return GGUFArray(buffer, start, stop, order)
    number: int | float = STRUCTS[order + LETTERS[kind]].unpack_from(buffer, start)[0]
    return number != 0 if kind is ValueType.BOOL else number


class GGUFArray(Sequence[Any]):
    """An array of metadata that decodes what is asked for. It keeps the file mapped.

    Items are int, float, bool, str or, in nested arrays, GGUFArray. Numbers are found directly; the first
    access to an item of strings or arrays walks over them once to learn where each begins.
    """

    __slots__ = ("_buffer", "_count", "_order", "_starts", "_stop", "element_type")

    element_type: ValueType

    def __init__(self, buffer: memoryview, start: int, stop: int, order: str) -> None:
        number, count = _ARRAY_HEADS[order].unpack_from(buffer, start)
        self._count: int = count
        self.element_type = _KINDS[number]
        self._buffer = buffer[start:stop]
        self._stop = stop - start
        self._order = order
        self._starts: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self._decode(range(self._count)[index])
        return self._decode((range(self._count)[operator.index(index)],))[0]

    def __iter__(self) -> Iterator[Any]:
        step = 4096  # decode in pieces, so that looping over a large array stays small
        for first in range(0, self._count, step):
            yield from self[first : first + step]

    def tolist(self) -> list[Any]:
        """All items, nested arrays as lists too."""
        items = self[:]
        return [item.tolist() for item in items] if self.element_type is ValueType.ARRAY else items

    def to_numpy(self) -> npt.NDArray[Any]:
        """A read-only one-dimensional view of an array of numbers, in the file's byte order; no copy.

        Bools come as a new array of ``bool``. Raises TypeError for strings and nested arrays.
        """
        if self.element_type not in LETTERS:
            raise TypeError(f"an array of {self.element_type.name} has no NumPy form; use tolist()")
        order: Literal["<", ">"] = "<" if self._order == "<" else ">"
        dtype = np.dtype(LETTERS[self.element_type]).newbyteorder(order)
        numbers = np.frombuffer(self._buffer, dtype, self._count, ARRAY_HEAD)
        return numbers != 0 if self.element_type is ValueType.BOOL else numbers

    @property
    def encoded(self) -> memoryview | None:
        """The array as a little-endian file holds it, head included; ``None`` in a big-endian file."""
        return self._buffer if self._order == "<" else None

    def __repr__(self) -> str:
        return f"<GGUFArray of {self._count} {self.element_type.name}>"

    def _decode(self, indices: Sequence[int]) -> list[Any]:
        if self.element_type in LETTERS:
            if self._order == "<" and sys.byteorder == "little" and self.element_type is not ValueType.BOOL:
                view: Any = self._buffer[ARRAY_HEAD:]
                view = view.cast(LETTERS[self.element_type])
                if len(indices) == self._count and isinstance(indices, range) and indices.step == 1:
                    items: list[Any] = view.tolist()
                    return items
                return [view[i] for i in indices]
            numbers = self.to_numpy()
            if isinstance(indices, range) and indices.step == 1:
                chosen = numbers[indices.start : indices.stop]
            else:
                chosen = numbers[list(indices)]
            decoded: list[Any] = chosen.tolist()
            return decoded
        return self._strings(indices) if self.element_type is ValueType.STRING else self._arrays(indices)

    def halves(self) -> list[tuple[str, str]] | None:
        """Each string divided at its first space, its first character aside; ``None`` where one has no such
        space, or holds a zero byte or what is not UTF-8.
        """
        flat = self._joined(halves=True) if self.element_type is ValueType.STRING else None
        return None if flat is None else list(zip(flat[::2], flat[1::2], strict=True))

    def _joined(self, *, halves: bool) -> list[str] | None:
        """All strings, or all halves, decoded in one go."""
        from azquant._backend import kernels

        joined: bytes | None = kernels().join_strings(
            self._buffer, ARRAY_HEAD, self._count, self._order, self._stop, halves=halves
        )
        try:
            return None if joined is None else joined.decode().split("\0")[:-1]
        except UnicodeDecodeError:
            return None

    def _strings(self, indices: Sequence[int]) -> list[str]:
        if len(indices) == self._count >= _MANY and isinstance(indices, range) and indices.step == 1:
            joined = self._joined(halves=False)
            if joined is not None:
                return joined
        starts = self._index()
        if not isinstance(indices, range) or indices.step != 1 or len(indices) < _MANY:
            buffer = self._buffer
            return [
                str(buffer[int(starts[i]) + 8 : int(starts[i + 1])], "utf-8", "surrogateescape")
                for i in indices
            ]
        # Many in a row are decoded some thousand at once, and then cut where each ends.
        strings: list[str] = []
        for first in range(indices.start, indices.stop, _DECODED_TOGETHER):
            bounds = starts[first : min(first + _DECODED_TOGETHER, indices.stop) + 1]
            raw = bytes(self._buffer[int(bounds[0]) : int(bounds[-1])])
            strings += _cut_text(raw, bounds - bounds[0])
        return strings

    def _arrays(self, indices: Sequence[int]) -> list[Value]:
        starts = self._index()
        return [
            decode_value(self._buffer, int(starts[i]), int(starts[i + 1]), ValueType.ARRAY, self._order)
            for i in indices
        ]

    def _index(self) -> npt.NDArray[np.int64]:
        """Where each item begins, and after the last where it ends: 8 bytes an item, made once."""
        if self._starts is None:
            starts = np.empty(self._count + 1, np.int64)
            at = ARRAY_HEAD
            try:
                if self.element_type is ValueType.STRING:
                    at = _skip_strings(self._buffer, at, self._count, self._order, self._stop, starts)
                else:
                    starts[0] = at
                    for i in range(self._count):
                        at = skip_value(self._buffer, at, self.element_type, self._order, self._stop)
                        starts[i + 1] = at
            except (Malformed, struct.error, OverflowError):
                at = -1
            if at != self._stop:
                raise GGUFError("the file was changed while it was open")
            self._starts = starts
        return self._starts


def _cut_text(raw: bytes, bounds: npt.NDArray[np.int64]) -> list[str]:
    """The strings of ``raw``, whose lengths (8 bytes) and bytes lie between ``bounds``."""
    is_text = np.ones(len(raw), np.bool_)
    for i in range(8):
        is_text[bounds[:-1] + i] = False
    letters = np.frombuffer(raw, np.uint8)[is_text]
    sizes = np.diff(bounds) - 8
    begins = letters & 0xC0 != 0x80  # the bytes that begin a character
    filled = np.flatnonzero(sizes)
    firsts = (np.cumsum(sizes) - sizes)[filled]
    try:
        if not begins[firsts].all():
            raise UnicodeError("a character is torn between two strings")
        text = str(letters.data, "utf-8")
    except UnicodeError:
        pairs = pairwise(bounds.tolist())
        return [raw[start + 8 : stop].decode("utf-8", "surrogateescape") for start, stop in pairs]
    if len(text) < len(letters):
        sizes[filled] = np.add.reduceat(begins, firsts, dtype=np.int64)
    cuts = np.cumsum(sizes).tolist()
    return [text[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]


Value: TypeAlias = bool | int | float | str | GGUFArray
"""What a metadata key can hold, in Python."""
