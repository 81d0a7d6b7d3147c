"""Metadata values on their way into a file: checked when they are made, held in the bytes to be written."""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from azquant._lazy import np
from azquant.errors import ArgumentError
from azquant.gguf.values import LETTERS, STRUCTS, GGUFArray, Malformed, ValueType, skip_value

__all__ = ["MetadataValue"]


@dataclass(frozen=True)
class MetadataValue:
    """A metadata value and the type it is stored as. :mod:`azquant.gguf.keys` has a short maker for each.

    ``value`` is an int, float, bool, str, or for arrays a sequence of these (a list, a one-dimensional
    NumPy array, a GGUFArray; for an array of arrays a sequence of array MetadataValues or GGUFArrays).
    ``element_type`` is needed for arrays, and only there. Raises ArgumentError when the value does not
    fit its type. Two are equal when they are written alike.

    Strings are written as UTF-8. A lone surrogate is refused, except U+DC80 to U+DCFF: Python's sign for
    a byte that was no UTF-8 when read, which becomes that byte again.
    """

    type: ValueType
    value: Any = field(compare=False)
    element_type: ValueType | None = None
    encoded: bytes | memoryview = field(default=b"", repr=False)
    """The bytes of the value in a little-endian file; made from ``value`` when left out."""

    def __post_init__(self) -> None:
        def put(name: str, item: object) -> None:
            object.__setattr__(self, name, item)

        put("type", _as_type(self.type))
        if self.type is not ValueType.ARRAY:
            if self.element_type is not None:
                raise ArgumentError(f"a {self.type.name} value has no element type")
        elif self.element_type is not None:
            put("element_type", _as_type(self.element_type))
        elif isinstance(self.value, GGUFArray):
            put("element_type", self.value.element_type)
        else:
            raise ArgumentError("an array needs an element type")
        if not self.encoded:
            if self.element_type is None:
                put("encoded", _encode_scalar(self.type, self.value))
            else:
                if isinstance(self.value, list):
                    put("value", tuple(self.value))  # what was encoded must not change afterwards
                put("encoded", _encode_array(self.element_type, self.value))


def _as_type(number: Any) -> ValueType:
    try:
        return ValueType(number)
    except ValueError:
        raise ArgumentError(f"{number!r} is no GGUF value type") from None


def _encode_scalar(kind: ValueType, value: Any) -> bytes:
    if kind is ValueType.STRING:
        return _encode_string(value)
    is_bool = isinstance(value, (bool, np.bool_))
    if kind is ValueType.BOOL:
        if not is_bool:
            raise ArgumentError(f"a BOOL takes True or False, not {_brief(value)}")
        return b"\x01" if value else b"\x00"
    if is_bool or isinstance(value, (str, bytes)):
        raise ArgumentError(f"{kind.name} takes a number, not {_brief(value)}")
    try:
        number = float(value) if kind in (ValueType.FLOAT32, ValueType.FLOAT64) else operator.index(value)
        return STRUCTS["<" + LETTERS[kind]].pack(number)
    except (TypeError, ValueError):
        raise ArgumentError(f"{kind.name} takes a number of its kind, not {_brief(value)}") from None
    except (struct.error, OverflowError):
        raise ArgumentError(f"{_brief(value)} is outside the range of {kind.name}") from None


def _encode_string(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ArgumentError(f"a STRING takes a str, not {_brief(value)}")
    try:
        encoded = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"a string holds the lone surrogate U+{ord(value[error.start]):04X} at position {error.start}, "
            "which UTF-8 cannot express"
        ) from None
    return STRUCTS["<Q"].pack(len(encoded)) + encoded


def _encode_array(kind: ValueType, items: Any) -> bytes | memoryview:
    if isinstance(items, GGUFArray):
        if items.element_type is not kind:
            raise ArgumentError(f"an array of {items.element_type.name} is none of {kind.name}")
        if items.encoded is not None:
            return items.encoded
    elif isinstance(items, (str, bytes)) or not isinstance(items, (Sequence, np.ndarray)):
        raise ArgumentError(f"an array takes a sequence, not {_brief(items)}")
    if isinstance(items, np.ndarray) and items.ndim != 1:
        raise ArgumentError(f"an array of metadata has one dimension, not {items.ndim}")
    encoded = struct.pack("<IQ", kind, len(items)) + _encode_items(kind, items)
    if kind is ValueType.ARRAY:
        try:
            skip_value(memoryview(encoded), 0, ValueType.ARRAY, "<", len(encoded))
        except Malformed as error:
            raise ArgumentError(error.message) from None
    return encoded


def _encode_items(kind: ValueType, items: Sequence[Any] | np.ndarray[Any, Any]) -> bytes:
    if kind is ValueType.STRING:
        return _encode_strings(items)
    if kind is ValueType.ARRAY:
        return b"".join([_located(i, _encode_inner, item) for i, item in enumerate(items)])
    if isinstance(items, (np.ndarray, GGUFArray)):
        items = items.tolist()
    try:
        if kind is not ValueType.BOOL and bool not in set(map(type, items)):  # struct takes True for 1
            return struct.pack(f"<{len(items)}{LETTERS[kind]}", *items)
    except (struct.error, OverflowError, TypeError):
        pass
    # One at a time says which does not fit, and takes what struct is too strict about.
    return b"".join([_located(i, _encode_scalar, kind, item) for i, item in enumerate(items)])


def _encode_strings(items: Sequence[Any] | np.ndarray[Any, Any]) -> bytes:
    if isinstance(items, (list, tuple)) and set(map(type, items)) <= {str}:
        pack = STRUCTS["<Q"].pack
        with suppress(UnicodeEncodeError):
            texts = [item.encode("utf-8", "surrogateescape") for item in items]
            return b"".join([part for text in texts for part in (pack(len(text)), text)])
    # One at a time says which is no text, and takes what only resembles a list of strings.
    return b"".join([_located(i, _encode_string, item) for i, item in enumerate(items)])


def _encode_inner(item: Any) -> bytes | memoryview:
    if isinstance(item, MetadataValue) and item.type is ValueType.ARRAY:
        return item.encoded
    if isinstance(item, GGUFArray):
        return _encode_array(item.element_type, item)
    raise ArgumentError(f"an array of arrays takes arrays made with keys.array, not {_brief(item)}")


def _located(index: int, encode: Any, *arguments: Any) -> Any:
    try:
        return encode(*arguments)
    except ArgumentError as error:
        raise ArgumentError(f"item {index}: {error}") from None


def _brief(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 60 else text[:57] + "..."
