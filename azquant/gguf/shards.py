"""Models split over several files: their names, and what makes several files one.

Files are named ``NAME-00001-of-00003.gguf``. Each holds ``split.no`` (counted from 0), ``split.count`` and
``split.tensors.count`` (of the whole model); the first holds the metadata besides, each its own tensors.
Source: ``llama-gguf-split`` and the loader of llama.cpp.

Shards that contradict each other are refused: another place or count than the name and the first shard say,
another byte order, other values of a key, a tensor that occurs twice, more or fewer tensors than announced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from azquant.gguf import keys
from azquant.gguf.header import Header
from azquant.gguf.values import LETTERS, STRUCTS, Malformed, ValueType

__all__ = ["SPLIT_KEYS", "Place", "check_shard", "check_total", "place_of", "shard_paths", "shard_prefix"]

SPLIT_KEYS = (keys.SPLIT_NO, keys.SPLIT_COUNT, keys.SPLIT_TENSORS_COUNT)
"""Keys that say how a file was cut, and are no part of the model."""

MAX_SHARDS = 0xFFFF  # the keys are uint16

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_ABOUT_THE_FILE = (*SPLIT_KEYS, keys.ALIGNMENT)
_NUMBERS = set(LETTERS) - {ValueType.BOOL, ValueType.FLOAT32, ValueType.FLOAT64}


class Place(NamedTuple):
    """Where a file stands among the shards of its model."""

    number: int  # from 0
    shards: int
    tensors: int | None  # of the whole model, where it is said


def place_of(header: Header) -> Place | None:
    """The place of a file, ``None`` where it is a model of its own. Raises Malformed for impossible ones."""
    count = _number(header, keys.SPLIT_COUNT)
    if count is None or count in (0, 1):
        return None
    number = _number(header, keys.SPLIT_NO)
    at = header.entries[keys.SPLIT_COUNT].start
    if not 0 < count <= MAX_SHARDS:
        raise Malformed(f"{keys.SPLIT_COUNT} is {count}; 1 to {MAX_SHARDS} shards are possible", at)
    if number is None:
        raise Malformed(f"{keys.SPLIT_COUNT} is {count}, but {keys.SPLIT_NO} is missing", at)
    if not 0 <= number < count:
        raise Malformed(
            f"{keys.SPLIT_NO} is {number} of {count} shards; it counts from 0",
            header.entries[keys.SPLIT_NO].start,
        )
    return Place(number, count, _number(header, keys.SPLIT_TENSORS_COUNT))


def _number(header: Header, key: str) -> int | None:
    entry = header.entries.get(key)
    if entry is None:
        return None
    if entry.kind not in _NUMBERS:
        raise Malformed(f"{key} is of type {entry.kind.name}; it must be a whole number", entry.start)
    number: int = STRUCTS[header.order + LETTERS[entry.kind]].unpack_from(header.buffer, entry.start)[0]
    return number


def shard_prefix(path: Path, place: Place) -> Path | None:
    """What stands before ``-00001-of-00003.gguf``; ``None`` if ``path`` is not named as its place asks."""
    found = _NAME.fullmatch(path.name)
    if found is None or (int(found[2]), int(found[3])) != (place.number + 1, place.shards):
        return None
    return path.with_name(found[1])


def shard_paths(prefix: Path, count: int) -> list[Path]:
    """The names of ``count`` shards, first to last: ``prefix-00001-of-00003.gguf``, ..."""
    return [prefix.with_name(f"{prefix.name}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]


def check_shard(header: Header, number: int, first: Header, names: set[str]) -> None:
    """That ``header`` is shard ``number`` of the model that ``first`` begins.

    ``names`` are the tensors of the shards before; its own are added. Raises Malformed where it contradicts.
    """
    whole = place_of(first)
    place = place_of(header)
    if place is None or whole is None:
        raise Malformed(f"this is no shard of a model: {keys.SPLIT_COUNT} is missing", 0)
    if place != whole._replace(number=number):
        raise Malformed(
            f"{_show(place)}; its name and the first shard say {_show(whole._replace(number=number))}",
            header.entries[keys.SPLIT_NO].start,
        )
    if header.order != first.order:
        raise Malformed("the byte order is not that of the first shard", 4)
    for key, entry in header.entries.items():
        other = first.entries.get(key)
        if other is None or key in _ABOUT_THE_FILE:
            continue
        if entry.kind is not other.kind or _bytes(header, key) != _bytes(first, key):
            raise Malformed(f"key {key[:60]!r} has another value than in the first shard", entry.start)
    for name, info in header.infos.items():
        if name in names:
            raise Malformed(f"tensor {name!r} is in an earlier shard too", info.at)
        names.add(name)


def check_total(headers: Sequence[Header]) -> None:
    """That the shards hold as many tensors together as the first announces. Raises Malformed."""
    place = place_of(headers[0])
    found = sum(len(header.infos) for header in headers)
    if place is not None and place.tensors is not None and place.tensors != found:
        raise Malformed(
            f"{keys.SPLIT_TENSORS_COUNT} announces {place.tensors} tensors; "
            f"the {place.shards} shards hold {found}",
            headers[0].entries[keys.SPLIT_TENSORS_COUNT].start,
        )


def _show(place: Place) -> str:
    tensors = "" if place.tensors is None else f" with {place.tensors} tensors together"
    return f"shard {place.number + 1} of {place.shards}{tensors}"


def _bytes(header: Header, key: str) -> memoryview:
    _, start, stop = header.entries[key]
    return header.buffer[start:stop]
