"""A model as a plain folder, to carry to another machine: files with readable names, and their checksums.

::

    manifest.json    as in the store          Modelfile     for `ollama create NAME -f Modelfile`
    model.gguf       config.json              template.txt  system.txt  params.json  license.txt ...
    model.json       the model's name, and which file is which blob
    SHA256SUMS       for `sha256sum -c SHA256SUMS`

Nothing in it is needed but manifest.json, model.json and the blobs' files; these three agree with each
other, or the import refuses.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from azquant.errors import AzquantError, InputFileError, OutputError, StoreError
from azquant.store import manifest as media
from azquant.store.info import read_info
from azquant.store.layout import Layout, Progress, hash_file, sha256
from azquant.store.manifest import LARGEST_MANIFEST, Manifest, is_digest, parse_manifest
from azquant.store.names import ModelName

__all__ = ["export_folder", "read_folder"]

_NAMES = {
    media.MODEL: "model.gguf",
    media.ADAPTER: "adapter.gguf",
    media.CONFIG: "config.json",
    media.TEMPLATE: "template.txt",
    media.PROMPT: "template.txt",
    media.SYSTEM: "system.txt",
    media.PARAMS: "params.json",
    media.MESSAGES: "messages.json",
    media.LICENSE: "license.txt",
}
_FORMAT = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


def export_folder(layout: Layout, name: ModelName, folder: Path, progress: Progress | None = None) -> Path:
    """Copy the model into the new ``folder``, which appears whole or not at all.

    Raises OutputError when it exists or cannot be written, StoreError when a blob is damaged.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise OutputError(f"{folder} already exists; export into a folder that does not")
    found, data, _ = layout.manifest(name)
    files = _file_names(found)
    total = sum(layer.size for layer in found.blobs())
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{folder} cannot be written: there is no folder {parent}")
    temporary = parent / f".azquant-{secrets.token_hex(8)}.tmp"
    try:
        free = shutil.disk_usage(parent).free
        if free < total:
            raise OutputError(f"{folder} needs {total} bytes; {parent} has {free} free: nothing was written")
        temporary.mkdir()
        sums = _copy_blobs(layout, found, files, temporary, total, progress)
        info = read_info(layout, name)
        info.modelfile.sources = ["./model.gguf"] if info.path else []
        info.modelfile.adapters = [f"./{files[layer.digest]}" for layer in found.of_type(media.ADAPTER)]
        about = {"format": _FORMAT, "name": str(name), "files": files}
        texts = {
            "manifest.json": data,
            "model.json": (json.dumps(about, indent=2) + "\n").encode(),
            "Modelfile": str(info.modelfile).encode(),
        }
        for file_name, content in texts.items():
            _write(temporary / file_name, content)
            sums[file_name] = sha256(content)
        lines = [
            f"{digest.removeprefix('sha256:')}  {file_name}\n" for file_name, digest in sorted(sums.items())
        ]
        _write(temporary / "SHA256SUMS", "".join(lines).encode())
        temporary.replace(folder)
    except OSError as error:
        if isinstance(error, AzquantError):
            raise
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _file_names(found: Manifest) -> dict[str, str]:
    """Digest -> file name, no two the same."""
    names: dict[str, str] = {}
    for layer in found.blobs():
        if layer.digest in names:
            continue
        wanted = _NAMES.get(layer.media_type, "layer.bin")
        stem, dot, ending = wanted.partition(".")
        number = 2
        while wanted in names.values():
            wanted, number = f"{stem}-{number}{dot}{ending}", number + 1
        names[layer.digest] = wanted
    return names


def _copy_blobs(
    layout: Layout,
    found: Manifest,
    files: dict[str, str],
    folder: Path,
    total: int,
    progress: Progress | None,
) -> dict[str, str]:
    sums: dict[str, str] = {}
    done = 0
    for layer in found.blobs():
        target = folder / files[layer.digest]
        if target.name not in sums:
            shutil.copyfile(layout.blob(layer), target)
            if hash_file(target) != layer.digest:
                raise StoreError(
                    "this blob is not what its name says (its SHA-256 is another)",
                    path=layout.blob_path(layer.digest),
                )
            _sync(target)
            sums[target.name] = layer.digest
        done += layer.size
        if progress is not None:
            progress(done, total)
    return sums


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_folder(folder: Path) -> tuple[str, bytes, list[tuple[Path, media.Layer]]]:
    """The name, the manifest's bytes, and each blob with its file, of an exported ``folder``.

    Sizes are compared here, digests when the files are added. Raises InputFileError for a file that is
    missing and StoreError for one that contradicts another.
    """
    if not folder.is_dir():
        raise InputFileError(f"{folder} is no folder; give one that `azquant export` made")
    about = _about(folder / "model.json")
    manifest_path = folder / "manifest.json"
    data = _read(manifest_path)
    found = parse_manifest(data, manifest_path)
    if found.config is None:
        raise StoreError("this is a list of manifests", path=manifest_path)
    blobs = []
    for layer in found.blobs():
        name = about["files"].get(layer.digest)
        if name is None:
            raise StoreError(f"files names no file for {layer.digest}", path=folder / "model.json")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise InputFileError(f"{path} is missing or no plain file")
        size = path.stat().st_size
        if size != layer.size:
            raise StoreError(f"{size} bytes instead of {layer.size}; copy the folder again", path=path)
        blobs.append((path, layer))
    return about["name"], data, blobs


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"not JSON ({error})", path=path) from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise StoreError(f"not an exported model of format {_FORMAT}", path=path)
    files = about.get("files")
    if not isinstance(about.get("name"), str) or not isinstance(files, dict):
        raise StoreError("name or files is missing", path=path)
    for digest, name in files.items():
        if not is_digest(digest) or not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise StoreError(f"files: {digest!r:.80} -> {name!r:.80} is no digest and file name", path=path)
    return about


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_MANIFEST + 1)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_MANIFEST:
        raise StoreError("too large", path=path)
    return data
