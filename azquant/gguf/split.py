"""Cutting a model into several files, and making one of them again, as ``llama-gguf-split`` does.

Names and keys are those of :mod:`azquant.gguf.shards`. Tensor data are copied byte for byte; from a
big-endian file they come out little-endian, as everything that is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from azquant.errors import ArgumentError
from azquant.gguf import keys
from azquant.gguf.atomic import AtomicFile
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.fill import fill
from azquant.gguf.header import DEFAULT_ALIGNMENT
from azquant.gguf.reader import GGUFFile, open_gguf
from azquant.gguf.shards import MAX_SHARDS, SPLIT_KEYS, shard_paths
from azquant.gguf.writer import Layout, Progress, TensorSpec, write_gguf

__all__ = ["copied_data", "copied_specs", "merge_gguf", "split_gguf", "write_shards", "write_split_gguf"]

DEFAULT_TENSORS = 128
"""Tensors in a shard when nothing is said; llama.cpp's default too."""


def copied_specs(file: GGUFFile) -> list[TensorSpec]:
    """What :func:`write_gguf` takes as ``tensors`` to write those of ``file``."""
    return [TensorSpec(tensor.name, tensor.shape, tensor.type) for tensor in file.tensors.values()]


def copied_data(file: GGUFFile) -> Any:
    """What :func:`write_gguf` takes as ``data`` to write the tensors of ``file`` as they are."""

    def data(spec: TensorSpec) -> Iterable[Any]:
        return (file.tensors[spec.name].data,)

    return data


def merge_gguf(
    first: str | PathLike[str],
    path: str | PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write the split model whose first shard is ``first`` as one file at ``path``.

    The keys that say how it was cut are left out. Raises ArgumentError when ``first`` is no shard, and what
    :func:`open_gguf` and :func:`write_gguf` raise.
    """
    with open_gguf(first) as file:
        if len(file.paths) == 1 and SPLIT_KEYS[0] not in file.metadata:
            raise ArgumentError(f"{file.path} is not split: there is nothing to merge")
        write_gguf(
            path,
            _without_split_keys(file),
            copied_specs(file),
            copied_data(file),
            alignment=file.alignment,
            overwrite=overwrite,
            sources=file.paths,
            verify=verify,
            progress=progress,
        )


def split_gguf(
    path: str | PathLike[str],
    prefix: str | PathLike[str],
    *,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    metadata_first: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> list[Path]:
    """Cut the file at ``path`` into ``prefix-00001-of-0000N.gguf``, ...; the names of these files.

    A shard ends before it would hold more than ``max_tensors`` tensors or ``max_bytes`` bytes of data (a
    larger tensor has a shard of its own); 128 tensors when neither is given. ``metadata_first`` leaves the
    first shard without tensors. A file that is split already is cut anew.

    The rest is as in :func:`write_split_gguf`. Raises what it and :func:`open_gguf` raise.
    """
    with open_gguf(path) as file:
        return write_split_gguf(
            prefix,
            _without_split_keys(file),
            copied_specs(file),
            copied_data(file),
            max_tensors=max_tensors,
            max_bytes=max_bytes,
            metadata_first=metadata_first,
            alignment=file.alignment,
            overwrite=overwrite,
            sources=file.paths,
            verify=verify,
            progress=progress,
        )


def write_split_gguf(
    prefix: str | PathLike[str],
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[Any]],
    *,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    metadata_first: bool = False,
    alignment: int = DEFAULT_ALIGNMENT,
    overwrite: bool = False,
    sources: Iterable[str | PathLike[str]] = (),
    verify: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a model as ``prefix-00001-of-0000N.gguf``, ...; the names of these files.

    ``metadata``, ``tensors``, ``data``, ``sources``, ``verify`` and ``threads`` are those of
    :func:`write_gguf`, the limits those of :func:`split_gguf`. All shards are written and verified before
    the first gets its name, so that a failure or a kill while they are written leaves nothing. Raises
    ArgumentError for limits below 1 or more than 65535 shards, and what :func:`write_gguf` raises.
    """
    for name, limit in (("max_tensors", max_tensors), ("max_bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise ArgumentError(f"{name} is {limit}; it must be at least 1")
    if max_tensors is None and max_bytes is None:
        max_tensors = DEFAULT_TENSORS
    groups = _cut(tensors, max_tensors, max_bytes, alignment)
    if metadata_first:
        groups.insert(0, [])
    if len(groups) > MAX_SHARDS:
        raise ArgumentError(f"{len(groups)} shards would be needed; {MAX_SHARDS} are possible")
    targets = shard_paths(Path(prefix), len(groups))
    layouts = [
        Layout(_shard_metadata(metadata if i == 0 else {}, i, len(groups), len(tensors)), group, alignment)
        for i, group in enumerate(groups)
    ]
    write_shards(targets, layouts, data, tuple(sources), overwrite, verify, progress, threads=threads)
    return targets


def write_shards(
    targets: Sequence[Path],
    layouts: Sequence[Layout],
    data: Callable[[TensorSpec], Iterable[Any]],
    sources: tuple[str | PathLike[str], ...],
    overwrite: bool,
    verify: bool,
    progress: Progress | None,
    *,
    sync: bool = True,
    threads: int = 1,
) -> None:
    """Write ``layouts`` to ``targets``; all are complete before the first gets its name."""
    total = sum(layout.total for layout in layouts)
    before = 0

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, total)

    with ExitStack() as stack:
        outputs = []
        left = total
        for target, layout in zip(targets, layouts, strict=True):
            output = AtomicFile(target, left, overwrite=overwrite, sources=sources)
            outputs.append(stack.enter_context(output))
            left -= layout.total
        for output, layout in zip(outputs, layouts, strict=True):
            fill(output, layout, data, verify=verify, sync=sync, threads=threads, progress=report)
            before += layout.total
        published: list[Path] = []
        try:
            for output, target in zip(outputs, targets, strict=True):
                is_new = not target.exists()
                output.publish()
                if is_new:
                    published.append(target)
        except BaseException:
            for target in published:  # shards without their fellows are of no use
                target.unlink(missing_ok=True)
            raise


def _cut(
    specs: Sequence[TensorSpec], max_tensors: int | None, max_bytes: int | None, alignment: int
) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        nbytes = spec.nbytes + -spec.nbytes % alignment
        full = max_tensors is not None and len(groups[-1]) == max_tensors
        if groups[-1] and (full or (max_bytes is not None and size + nbytes > max_bytes)):
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += nbytes
    return groups


def _shard_metadata(
    metadata: Mapping[str, MetadataValue], number: int, count: int, tensors: int
) -> dict[str, MetadataValue]:
    return {
        **metadata,
        keys.SPLIT_NO: keys.u16(number),
        keys.SPLIT_COUNT: keys.u16(count),
        keys.SPLIT_TENSORS_COUNT: keys.i32(tensors),
    }


def _without_split_keys(file: GGUFFile) -> dict[str, MetadataValue]:
    return {key: value for key, value in file.copy_metadata().items() if key not in SPLIT_KEYS}
