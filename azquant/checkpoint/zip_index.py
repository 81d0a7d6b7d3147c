"""Where the members of a zip archive lie, for archives whose members are stored, not compressed.

Only what torch writes is accepted: one archive that spans the whole file, plain names, no encryption. Reading
member bytes is left to the caller's positioned reads. Layout after PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from azquant.checkpoint.source import FileSource
from azquant.errors import CheckpointError

__all__ = ["MAX_MEMBERS", "Member", "ZipIndex"]

MAX_MEMBERS = 100_000
"""More than the largest published checkpoints have storages. Keeps opening fast."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_MAX_COMMENT = 0xFFFF
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1
_STORED = 0


class Member(NamedTuple):
    """One member: where its local header lies, its size, and the byte its data must not reach past."""

    name: str
    header_offset: int
    size: int
    limit: int


class ZipIndex:
    """The members of a zip archive by name. Raises CheckpointError when the archive is broken or unusual."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        count, size, offset = self._find_directory()
        if count > MAX_MEMBERS:
            raise self._error(
                f"the zip archive claims {count} members; at most {MAX_MEMBERS} are read", offset
            )
        if count * _CENTRAL.size > size:
            raise self._error(f"the zip directory claims {count} members in {size} bytes", offset)
        self.members: Mapping[str, Member] = self._read_directory(count, size, offset)

    def data_offset(self, member: Member) -> int:
        """The byte at which the data of ``member`` starts; its local header is read and checked."""
        header = self._source.read(member.header_offset, _LOCAL.size)
        signature, _, flags, method, _, _, _, _, _, name_size, extra_size = _LOCAL.unpack(header)
        start: int = member.header_offset + _LOCAL.size
        if signature != b"PK\3\4" or flags & _ENCRYPTED or method != _STORED:
            raise self._error(f"zip member {member.name!r} has a broken header", member.header_offset)
        if self._source.read(start, name_size) != member.name.encode():
            raise self._error(f"zip member {member.name!r} has another name in its own header", start)
        start += name_size + extra_size
        if start + member.size > member.limit:
            raise self._error(f"zip member {member.name!r} runs into what follows it", start)
        return start

    def _error(self, message: str, offset: int | None) -> CheckpointError:
        return CheckpointError(message, path=self._source.path, offset=offset)

    def _find_directory(self) -> tuple[int, int, int]:
        """(members, bytes, offset) of the central directory, from the record at the end of the file."""
        tail_size = min(self._source.size, _END.size + _MAX_COMMENT)
        tail_start = self._source.size - tail_size
        tail = self._source.read(tail_start, tail_size)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < _END.size:
            raise self._error("the zip archive has no end record: the file is truncated", None)
        end = tail_start + at
        _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(tail, at)
        if end + _END.size + comment != self._source.size:
            raise self._error("bytes follow the end of the zip archive, or its end is damaged", end)
        if disk in (0, _U16) and first_disk in (0, _U16) and here == count:
            if end >= _LOCATOR.size:
                locator = self._source.read(end - _LOCATOR.size, _LOCATOR.size)
                if locator.startswith(b"PK\6\7"):
                    return self._read_end64(locator, end, (count, size, offset))
            self._check_directory(size, offset, end)
            return count, size, offset
        raise self._error("the zip archive is split over several files", end)

    def _read_end64(self, locator: bytes, end: int, short: tuple[int, int, int]) -> tuple[int, int, int]:
        _, _, at, _ = _LOCATOR.unpack(locator)
        if at + _END64.size > end:
            raise self._error("the zip64 end record lies past its place", end)
        signature, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack(
            self._source.read(at, _END64.size)
        )
        if signature != b"PK\6\6" or disk or first_disk or here != count:
            raise self._error("the zip64 end record is damaged", at)
        for value, low, full in zip((count, size, offset), short, (_U16, _U32, _U32), strict=True):
            if low not in (value, full):  # two readers would see two archives
                raise self._error("the two end records of the zip archive disagree", at)
        self._check_directory(size, offset, at)
        return count, size, offset

    def _check_directory(self, size: int, offset: int, end: int) -> None:
        if offset + size != end:
            raise self._error(
                f"the zip directory ({size} bytes at {offset}) does not end where it should", end
            )

    def _read_directory(self, count: int, size: int, offset: int) -> dict[str, Member]:
        data = self._source.read(offset, size)
        found: list[tuple[int, int, str]] = []
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > size:
                raise self._error("the zip directory is cut short", offset + at)
            fields = _CENTRAL.unpack_from(data, at)
            signature, flags, method = fields[0], fields[3], fields[4]
            packed, length = fields[8:10]
            name_size, extra_size, comment_size = fields[10:13]
            header = fields[16]
            name_at = at + _CENTRAL.size
            extra_at = name_at + name_size
            following = extra_at + extra_size + comment_size
            if signature != b"PK\1\2" or following > size:
                raise self._error("the zip directory is damaged", offset + at)
            try:
                name = data[name_at:extra_at].decode("utf-8")
            except UnicodeDecodeError as e:
                raise self._error("a zip member's name is not UTF-8", offset + name_at) from e
            if flags & _ENCRYPTED:
                raise self._error(f"zip member {name!r} is encrypted", offset + at)
            if _U32 in (packed, length, header):
                extra = data[extra_at : extra_at + extra_size]
                length, packed, header = self._widen(extra, length, packed, header, offset + extra_at)
            if method != _STORED or packed != length:
                raise self._error(
                    f"zip member {name!r} is compressed; torch stores members as they are. "
                    "Unpack the archive and pack it again with `zip -0`, or save the model anew",
                    offset + at,
                )
            found.append((header, length, name))
            at = following
        if at != size:
            raise self._error("the zip directory holds more than its members", offset + at)
        return self._arrange(found, offset)

    def _widen(
        self, extra: bytes, length: int, packed: int, header: int, offset: int
    ) -> tuple[int, int, int]:
        """The three values with those that are 0xffffffff taken from the zip64 extra field."""
        at = 0
        while at + 4 <= len(extra):
            tag, size = struct.unpack_from("<2H", extra, at)
            if tag == 1:
                whole = min(size, len(extra) - at - 4) // 8
                words = iter(struct.unpack_from(f"<{whole}Q", extra, at + 4))
                try:
                    return (
                        next(words) if length == _U32 else length,
                        next(words) if packed == _U32 else packed,
                        next(words) if header == _U32 else header,
                    )
                except StopIteration:
                    break
            at += 4 + size
        raise self._error("a zip member's 64-bit sizes are missing", offset)

    def _arrange(self, found: list[tuple[int, int, str]], end: int) -> dict[str, Member]:
        """The members by name; they may neither overlap nor repeat, so that all together fit in the file."""
        found.sort()
        members: dict[str, Member] = {}
        limits = [header for header, _, _ in found[1:]] + [end]
        for (header, length, name), limit in zip(found, limits, strict=True):
            if header + _LOCAL.size + len(name.encode()) + length > limit:
                raise self._error(f"zip member {name!r} ({length} bytes) overlaps what follows it", header)
            if name in members:
                raise self._error(f"two zip members are called {name!r}", header)
            members[name] = Member(name, header, length, limit)
        return members
