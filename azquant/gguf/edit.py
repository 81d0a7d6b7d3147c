"""Changing the metadata of a file; its tensors stay what they are, bit by bit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from azquant.errors import ArgumentError
from azquant.gguf import keys
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.header import DEFAULT_ALIGNMENT
from azquant.gguf.reader import GGUFFile, open_gguf
from azquant.gguf.split import copied_data, copied_specs
from azquant.gguf.values import ValueType
from azquant.gguf.writer import Progress, write_gguf

__all__ = ["edit_gguf", "edited_metadata"]


def edited_metadata(
    file: GGUFFile, values: Mapping[str, Any] | None = None, remove: Iterable[str] = ()
) -> dict[str, MetadataValue]:
    """The metadata of ``file`` after an edit: nothing is written.

    ``remove`` are keys to leave out. ``values`` are set afterwards: a MetadataValue as it is, anything else
    in the type the key has now. Keys that stay keep their place and bytes; new ones come last.

    Raises ArgumentError for a key that is not there to be removed, a new key whose value is no
    MetadataValue, and a value that does not fit its type.
    """
    metadata = file.copy_metadata()
    for key in remove:
        if key not in metadata:
            raise ArgumentError(f"{file.path} has no key {key!r}{_suggestion(key, metadata)}")
        del metadata[key]
    for key, value in (values or {}).items():
        if isinstance(value, MetadataValue):
            metadata[key] = value
            continue
        old = metadata.get(key)
        if old is None:
            raise ArgumentError(
                f"{file.path} has no key {key!r}{_suggestion(key, metadata)}; a new key needs a typed value: "
                "see azquant.gguf.keys, or --add on the command line"
            )
        try:
            metadata[key] = MetadataValue(old.type, value, old.element_type)
        except ArgumentError as error:
            raise ArgumentError(f"key {key!r}: {error}") from None
    return metadata


def edit_gguf(
    path: str | PathLike[str],
    destination: str | PathLike[str] | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    remove: Iterable[str] = (),
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write the file at ``path`` with other metadata (see :func:`edited_metadata`) to ``destination``.

    Without ``destination``, or when it is the same file and ``overwrite`` is set, ``path`` itself is
    replaced, in one step and only after the new file is complete and verified: whatever happens, the old or
    the new file is there. A symbolic link stays one; another hard link keeps the old file. Needs room for
    both. A later shard of a split model may be edited too.

    The tensors keep their order, names, types and bytes, packed without gaps; bytes after the last tensor
    are not kept, and a big-endian file becomes little-endian.

    Raises ArgumentError as edited_metadata does, and what :func:`open_gguf` and :func:`write_gguf` raise.
    """
    with open_gguf(path, join=False) as file:
        metadata = edited_metadata(file, values, remove)
        in_place = destination is None or (overwrite and _is_same(Path(path), Path(destination)))
        write_gguf(
            path if destination is None else destination,
            metadata,
            copied_specs(file),
            copied_data(file),
            alignment=_alignment(metadata),
            overwrite=overwrite or destination is None,
            sources=() if in_place else (path,),
            verify=verify,
            progress=progress,
        )


def _alignment(metadata: Mapping[str, MetadataValue]) -> int:
    stated = metadata.get(keys.ALIGNMENT)
    if stated is None:
        return DEFAULT_ALIGNMENT
    if stated.type is not ValueType.UINT32:
        raise ArgumentError(f"{keys.ALIGNMENT} is to be of type {stated.type.name}; it must be UINT32")
    return int(stated.value)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def _suggestion(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known)[:10_000], 1)
    return f" (is {near[0]!r} meant?)" if near else ""
