"""The header of a GGUF file: everything before the tensors' data, parsed and checked.

A file is: magic, uint32 version, uint64 number of tensors, uint64 number of keys; the keys with their
values; the tensor table (name, dimensions, type, offset into the data); padding up to
``general.alignment``; the data. Versions 2 and 3 are read, in both byte orders. Source: the GGUF
specification (docs/gguf.md of ggml).

What is refused, beyond bytes that are not there, and why:

- duplicate or empty keys and names, names of 64 bytes or more, NUL or broken UTF-8 in them: the C readers
  would see another name than we do;
- tensors that overlap, lie off the alignment or reach past the end. Gaps, any order and bytes after the
  last tensor are legal;
- an alignment that is no power of two, or larger than 2 MiB; more than 65536 keys or 131072 tensors: no
  real file has them, and Python objects for them would be many times the size of the file.

A file that ends exactly where its data should begin is a *header-only* file. It opens, and its tensors
raise GGUFError when their data is asked for; any other file that is too short is refused.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import NamedTuple

from azquant.gguf.values import STRUCTS, Malformed, ValueType, skip_value, value_type
from azquant.types import GGMLType, type_by_id

__all__ = ["Entry", "Header", "TensorInfo"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 21
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 0xFFFF
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, terminator included
MAX_DIMENSIONS = 4
MAX_SIZE = (1 << 63) - 1  # what ggml and NumPy count elements and bytes with

_LEAST_KEY = 8 + 1 + 4 + 1  # length, one letter, type, one byte
_LEAST_TENSOR = 8 + 1 + 4 + 4 + 8  # length, one letter, no dimensions, type, offset

_OTHER_FILES = {
    b"ggml": "a ggml file from before GGUF",
    b"lmgg": "a ggml file from before GGUF",
    b"tjgg": "a ggml file from before GGUF",
    b"fmgg": "a ggml file from before GGUF",
    b"algg": "a ggml adapter from before GGUF",
    b"FUGG": "a file with its magic reversed",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"vers": "perhaps a Git LFS pointer instead of the file: run git lfs pull",
    b"<htm": "a web page instead of the file",
    b"<!DO": "a web page instead of the file",
}


class Entry(NamedTuple):
    """Where a key's value lies in the file, and its type."""

    kind: ValueType
    start: int
    stop: int


class TensorInfo(NamedTuple):
    """An entry of the tensor table."""

    shape: tuple[int, ...]  # NumPy's order
    type: GGMLType
    offset: int  # into the data section
    nbytes: int
    at: int  # where in the file the offset is written, for messages


class Header:
    """The header of the file whose bytes are ``buffer``. Making one raises Malformed if anything is wrong."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.end = len(buffer)
        self.order = "<"
        self.alignment = DEFAULT_ALIGNMENT
        self.entries: dict[str, Entry] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._at = 0

        self._check_magic()
        self.version = self._read_version()
        n_tensors = self._number("Q", "the number of tensors")
        n_keys = self._number("Q", "the number of keys")
        self._check_count(n_tensors, MAX_TENSORS, _LEAST_TENSOR, "tensors", 8)
        self._check_count(n_keys, MAX_KEYS, _LEAST_KEY, "keys", 16)
        for index in range(n_keys):
            self._read_key(index)
        for index in range(n_tensors):
            self._read_tensor(index)

        self.data_offset = self._at + -self._at % self.alignment
        self.is_header_only = self.end == self.data_offset and any(
            info.nbytes for info in self.infos.values()
        )
        self._check_layout()

    def _check_magic(self) -> None:
        magic = bytes(self.buffer[:4])
        if magic != MAGIC:
            kind = _OTHER_FILES.get(magic)
            hint = f" ({kind})" if kind else ""
            raise Malformed(f"not a GGUF file: it begins with {magic!r}{hint}, not {MAGIC!r}", 0)
        self._at = 4

    def _read_version(self) -> int:
        version = self._number("I", "the version")
        if version not in (1, 2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped not in (1, 2, 3):
                raise Malformed(f"GGUF version {version} is not known; versions 2 and 3 are", 4)
            self.order = ">"
            version = swapped
        if version == 1:
            raise Malformed("GGUF version 1 is no longer read, here or elsewhere; convert the model anew", 4)
        return version

    def _check_count(self, count: int, limit: int, least: int, what: str, at: int) -> None:
        if count > limit:
            raise Malformed(f"{count} {what} are declared; at most {limit} are read", at)
        if count * least > self.end - self._at:
            raise Malformed(
                f"{count} {what} are declared, which the remaining {self.end - self._at} bytes cannot hold",
                at,
            )

    def _read_key(self, index: int) -> None:
        at = self._at
        key = self._name(f"key {index}", MAX_KEY_BYTES)
        if key in self.entries:
            raise Malformed(f"key {_quoted(key)} occurs twice", at)
        try:
            kind = value_type(self._number("I", "the type of the value"), self._at - 4)
            start = self._at
            self._at = skip_value(self.buffer, start, kind, self.order, self.end)
        except Malformed as error:
            raise Malformed(f"key {_quoted(key)}: {error.message}", error.offset) from None
        self.entries[key] = Entry(kind, start, self._at)
        if key == "general.alignment":
            self.alignment = self._check_alignment(kind, start)

    def _check_alignment(self, kind: ValueType, start: int) -> int:
        if kind is not ValueType.UINT32:
            raise Malformed(f"general.alignment is of type {kind.name}; it must be UINT32", start)
        alignment: int = STRUCTS[self.order + "I"].unpack_from(self.buffer, start)[0]
        if alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
            raise Malformed(
                f"general.alignment is {alignment}; it must be a power of two up to {MAX_ALIGNMENT}", start
            )
        return alignment

    def _read_tensor(self, index: int) -> None:
        at = self._at
        name = self._name(f"the name of tensor {index}", MAX_NAME_BYTES)
        if name in self.infos:
            raise Malformed(f"tensor {name!r} occurs twice", at)
        what = f"the entry of tensor {name!r}"
        at = self._at
        n_dims = self._number("I", what)
        if n_dims > MAX_DIMENSIONS:
            raise Malformed(f"tensor {name!r} has {n_dims} dimensions; at most 4 are possible", at)
        at = self._at
        shape = tuple(self._number("Q", what) for _ in range(n_dims))[::-1]
        if any(d > MAX_SIZE for d in shape) or prod(d or 1 for d in shape) > MAX_SIZE:
            raise Malformed(f"tensor {name!r} has an impossible shape {shape}", at)
        at = self._at
        number = self._number("I", what)
        kind = type_by_id(number)
        if kind is None:
            raise Malformed(f"tensor {name!r} has the unknown type {number}", at)
        row = shape[-1] if shape else 1
        if row % kind.block_size:
            raise Malformed(
                f"tensor {name!r} of type {kind} has rows of {row} elements, "
                f"not a whole number of blocks of {kind.block_size}",
                at,
            )
        nbytes = prod(shape) // kind.block_size * kind.block_bytes
        at = self._at
        offset = self._number("Q", what)
        if offset + nbytes > MAX_SIZE:
            raise Malformed(f"tensor {name!r} of {nbytes} bytes at offset {offset} fits in no file", at)
        self.infos[name] = TensorInfo(shape, kind, offset, nbytes, at)

    def _check_layout(self) -> None:
        """Every tensor aligned, in the file, and on no other's bytes."""
        if self.infos and self.end < self.data_offset:
            raise Malformed(
                f"the file ends at byte {self.end}, before the data should begin at {self.data_offset}",
                self.end,
            )
        available = self.end - self.data_offset
        for name, info in self.infos.items():
            if info.offset % self.alignment:
                raise Malformed(
                    f"the offset {info.offset} of tensor {name!r} is no multiple of {self.alignment}", info.at
                )
            if info.offset + info.nbytes > available and not self.is_header_only:
                first = self.data_offset + info.offset
                raise Malformed(
                    f"tensor {name!r} takes bytes {first} to {first + info.nbytes}, but the file ends at "
                    f"{self.end}: it was cut short, or its tensor table is wrong",
                    info.at,
                )
        taken = sorted((info.offset, info.nbytes, name) for name, info in self.infos.items() if info.nbytes)
        for (offset, nbytes, name), (following, _, other) in pairwise(taken):
            if following < offset + nbytes:
                raise Malformed(f"tensors {name!r} and {other!r} overlap", self.infos[other].at)

    def _number(self, letter: str, what: str) -> int:
        packed = STRUCTS[self.order + letter]
        if self.end - self._at < packed.size:
            raise Malformed(f"the file ends inside {what}", self._at)
        number: int = packed.unpack_from(self.buffer, self._at)[0]
        self._at += packed.size
        return number

    def _name(self, what: str, limit: int) -> str:
        at = self._at
        length = self._number("Q", what)
        if not 0 < length <= limit:
            raise Malformed(f"{what} is {length} bytes long; 1 to {limit} are possible", at)
        if length > self.end - self._at:
            raise Malformed(f"the file ends inside {what}", at)
        raw = bytes(self.buffer[self._at : self._at + length])
        self._at += length
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise Malformed(f"{what} is not valid UTF-8: {_quoted(raw)}", at + 8) from None
        if "\0" in name:
            raise Malformed(f"{what} holds a NUL byte: {_quoted(name)}", at + 8)
        return name


def _quoted(text: str | bytes) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else quoted[:77] + "..."
