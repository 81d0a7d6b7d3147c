"""Whether a store is whole, and what lies in it that no model needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from azquant.errors import AzquantError
from azquant.store.layout import PARTIAL, Layout, Progress, hash_file
from azquant.store.manifest import Layer, is_digest, parse_manifest
from azquant.store.partial import is_in_use

__all__ = ["Problem", "check"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found in a store. ``kind`` is one of:

    ``manifest`` (cannot be read), ``missing`` (a blob that a model needs), ``size``, ``digest`` (a blob
    that is not what its name says); and debris, which no model needs: ``unused`` (a blob), ``partial`` (an
    unfinished download; it would be resumed), ``temporary``.
    """

    kind: str
    path: Path
    text: str
    models: tuple[str, ...] = ()
    """The models that are harmed."""
    repaired: bool = False

    @property
    def is_debris(self) -> bool:
        """Whether no model is harmed and repair removes it."""
        return self.kind in ("unused", "partial", "temporary")


def check(
    layout: Layout, *, repair: bool = False, quick: bool = False, progress: Progress | None = None
) -> list[Problem]:
    """Look at every manifest and every blob; ``quick`` does not read the blobs, only their sizes.

    ``repair`` removes debris, and nothing else: not a damaged blob, not the manifest of a model that lacks
    one. While a manifest cannot be read no blob counts as unused. Unfinished downloads of a process that
    still runs are left alone, and Ollama's own (``…-partial``) always.
    """
    if not layout.root.is_dir():
        return []
    if not repair:
        return list(_problems(layout, quick, progress))
    with layout.deleting():
        found = list(_problems(layout, quick, progress))
        for i, problem in enumerate(found):
            if problem.is_debris:
                with suppress(OSError):
                    problem.path.unlink()
                    found[i] = replace(problem, repaired=True)
    return found


def _problems(layout: Layout, quick: bool, progress: Progress | None) -> Iterator[Problem]:
    needed: dict[str, tuple[Layer, list[str]]] = {}
    referred: set[str] = set()
    readable = True
    for path in layout.manifest_files():
        name = "/".join(path.relative_to(layout.root).parts[1:])
        try:
            layout.add_references(path, referred)
            for layer in parse_manifest(layout.read_manifest(path), path).blobs():
                needed.setdefault(layer.digest, (layer, []))[1].append(name)
        except AzquantError as error:
            readable = False
            yield Problem("manifest", path, str(error).removeprefix(f"{path}: "), (name,))
    total = sum(layer.size for layer, _ in needed.values())
    done = 0
    for _, (layer, models) in sorted(needed.items()):
        problem = _blob_problem(layout, layer, tuple(models), quick)
        done += layer.size
        if progress is not None:
            progress(done, total)
        if problem is not None:
            yield problem
    yield from _debris(layout, referred if readable else None)


def _blob_problem(layout: Layout, layer: Layer, models: tuple[str, ...], quick: bool) -> Problem | None:
    path = layout.blob_path(layer.digest)
    try:
        size = path.stat().st_size
    except OSError:
        return Problem("missing", path, f"the blob of {layer.size} bytes is missing", models)
    if size != layer.size:
        return Problem("size", path, f"the blob has {size} bytes, not {layer.size}", models)
    if not quick:
        try:
            if hash_file(path) != layer.digest:
                return Problem("digest", path, "the blob's bytes are not those its name tells", models)
        except AzquantError as error:
            return Problem("digest", path, str(error), models)
    return None


def _debris(layout: Layout, referred: set[str] | None) -> Iterator[Problem]:
    folders = [layout.root, layout.blobs, *(p for p in layout.manifests.glob("**/") if p != layout.root)]
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob(".azquant-*")) if folder.is_dir() else []:
            if is_in_use(path):
                continue
            if path.name.startswith(PARTIAL):
                yield Problem("partial", path, "an unfinished download (pulling again would resume it)")
            elif path.is_file():
                yield Problem("temporary", path, "left behind by a process that was ended")
    if referred is None or not layout.blobs.is_dir():
        return
    for path in sorted(layout.blobs.iterdir()):
        if is_digest(path.name) and path.name.lower().replace("-", ":", 1) not in referred:
            yield Problem("unused", path, "no model refers to this blob")
