"""SentencePiece's character map: which sequences of characters a text's are replaced by, before it is cut.

The map is a Darts double array over UTF-8 bytes; its values point into a table of replacements, each ended by
a NUL.
At each position the longest sequence that the array knows is replaced, as SentencePiece and llama.cpp do it;
``tokenizers`` looks at whole grapheme clusters first and so treats some marks and line ends differently.

Source of the format: builder.cc and normalizer.cc of github.com/google/sentencepiece; darts-clone's units.
"""

from __future__ import annotations

import struct
from typing import Any

from azquant.errors import TokenizerError

__all__ = ["Charsmap"]


class Charsmap:
    """A precompiled_charsmap. Raises TokenizerError for bytes that are none."""

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if len(data) < 8 or size % 4 or size < 4 or 4 + size > len(data):
            raise TokenizerError(f"the precompiled charsmap of {len(data)} bytes is cut short or none at all")
        self._units: list[int] = list(struct.unpack_from(f"<{size // 4}I", data, 4))
        self._replacements = data[4 + size :]

    def normalize(self, normalized: Any) -> None:
        """Replace the text of a ``tokenizers.NormalizedString`` in place."""
        text = normalized.normalized
        changed = self.apply(text)
        if changed != text:
            normalized.clear()
            if changed:
                normalized.append(changed)

    def apply(self, text: str) -> str:
        """``text`` with every longest known sequence replaced."""
        data = text.encode("utf-8")
        out = bytearray()
        at = 0
        while at < len(data):
            value, length = self._longest(data, at)
            if length:
                out += self._replacement(value)
            else:
                length = _char_length(data[at])
                out += data[at : at + length]
            at += length
        return out.decode("utf-8", "replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """(value, length in bytes) of the longest sequence from ``start``; length 0 if there is none."""
        units = self._units
        value = length = 0
        try:
            position = _offset(units[0])
            for at in range(start, len(data)):
                position ^= data[at]
                unit = units[position]
                if unit & 0x800000FF != data[at]:
                    break
                position ^= _offset(unit)
                if unit >> 8 & 1:
                    value, length = units[position] & 0x7FFFFFFF, at - start + 1
        except IndexError:
            raise TokenizerError("the precompiled charsmap points outside itself; it is damaged") from None
        return value, length

    def _replacement(self, value: int) -> bytes:
        end = self._replacements.find(b"\0", value)
        if value >= len(self._replacements) or end < 0:
            raise TokenizerError("the precompiled charsmap points outside itself; it is damaged")
        return self._replacements[value:end]


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _char_length(byte: int) -> int:
    return 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
