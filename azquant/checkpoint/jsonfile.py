"""JSON out of untrusted files: bounded in size, number length and nesting, with errors of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from azquant.checkpoint.source import FileSource
from azquant.errors import CheckpointError

__all__ = ["parse_object", "read_object"]

# No number in these files has more digits; int() of a long digit string takes quadratic time on Python 3.10.
_MAX_DIGITS = 40
# Brackets and commas: each may cost a Python object, many times its own byte. 100,000 tensors have about a
# million.
_MAX_STRUCTURE = 1_500_000


def read_object(path: Path, max_bytes: int, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object that is the whole of ``path``; with ``unique`` no key may repeat.

    Raises InputFileError (missing, unreadable) and CheckpointError (too large, no UTF-8, no JSON object).
    """
    source = FileSource(path)
    try:
        if source.size > max_bytes:
            raise CheckpointError(f"{source.size} bytes; at most {max_bytes} are read", path=path)
        data = source.read(0, source.size)
    finally:
        source.close()
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]  # some Windows editors add this mark
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError("this is a Git LFS pointer, not the file itself; run `git lfs pull`", path=path)
    return parse_object(data, path, unique=unique)


def parse_object(data: bytes, path: Path, *, offset: int = 0, unique: bool = False) -> dict[str, Any]:
    """``data``, which lies at ``offset`` in ``path``, as a JSON object; with ``unique`` no key may repeat.

    Raises CheckpointError saying what is wrong and at which byte.
    """
    if sum(map(data.count, (b"{", b"[", b","))) > _MAX_STRUCTURE:
        raise CheckpointError(f"the JSON text has more than {_MAX_STRUCTURE} parts", path=path, offset=offset)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError("the JSON text is not UTF-8", path=path, offset=offset + e.start) from e
    try:
        value = json.loads(text, parse_int=_int, object_pairs_hook=_unique_pairs if unique else None)
    except json.JSONDecodeError as e:
        at = offset + len(text[: e.pos].encode("utf-8"))
        raise CheckpointError(f"not valid JSON: {e.msg}", path=path, offset=at) from e
    except RecursionError as e:
        raise CheckpointError("the JSON text is nested too deeply", path=path, offset=offset) from e
    except ValueError as e:
        raise CheckpointError(f"bad JSON: {e}", path=path, offset=offset) from e
    if not isinstance(value, dict):
        raise CheckpointError(
            f"a JSON object is needed, this is a {type(value).__name__}", path=path, offset=offset
        )
    return value


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return result
