"""Finding a checkpoint's files: a folder's config, weights and shards, or one weight file.

Files are told apart by their first bytes; the name only decides what an unrecognizable one should have been.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from azquant.checkpoint.base import Checkpoint
from azquant.checkpoint.jsonfile import read_object
from azquant.checkpoint.safetensors import read_safetensors
from azquant.checkpoint.source import FileSource
from azquant.checkpoint.tensor import LazyTensor
from azquant.checkpoint.torch_zip import read_torch
from azquant.errors import CheckpointError, InputFileError

__all__ = ["MAX_CONFIG_BYTES", "MAX_INDEX_BYTES", "open_checkpoint"]

MAX_CONFIG_BYTES = 16_000_000
MAX_INDEX_BYTES = 64_000_000

_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_INDEX = ".index.json"
# In order of preference. Safetensors come first: nothing in them is ever interpreted.
_WEIGHT_FILES = (_SAFETENSORS, _SAFETENSORS + _INDEX, _TORCH, _TORCH + _INDEX)
_LOOKS_LIKE_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}

# Magic numbers of ggml's files before GGUF, as they lie in the file (little-endian words).
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg", b"nugg")
# torch < 1.6 wrote this integer as a pickle of its own before everything else.
_OLD_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_RESAVE = "save it anew with a current torch: torch.save(torch.load(path, weights_only=True), path)"

_Format = Literal["safetensors", "torch"]


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Open a Hugging Face checkpoint folder, a weight file, or a shard index (``*.index.json``).

    In a folder, the first of model.safetensors, model.safetensors.index.json, pytorch_model.bin and
    pytorch_model.bin.index.json is used. The config.json of that folder, or beside that file, is parsed if
    there is one. Opening reads headers only. Nothing in a file is ever executed.

    With an index, every tensor it lists must be in the shard it names; tensors of the shards that it does not
    list are included too, as transformers does, unless two shards hold one of that name.

    Raises InputFileError (missing, unreadable) and CheckpointError (a file that breaks its format; its
    subclass UnsafePickleError for a pickle that asks for more than tensors).
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
        weights = _find_weights(path) if is_folder else path
        config_path = weights.parent / "config.json"
        has_config = config_path.exists()
    except (OSError, ValueError) as e:  # ValueError: a NUL byte in the path
        raise InputFileError(f"{str(path)!r}: cannot be read: {e}") from e
    with ExitStack() as opened:
        if weights.name.endswith(_INDEX):
            format, tensors, sources, extra = _open_sharded(weights, opened)
        else:
            source = _open(weights, opened)
            format, tensors, extra = _read_file(source)
            sources = [source]
        config = read_object(config_path, MAX_CONFIG_BYTES) if has_config else None
        opened.pop_all()
    return Checkpoint(path, format, tensors, config, tuple(sources), extra)


def _open(path: Path, opened: ExitStack) -> FileSource:
    source = FileSource(path)
    opened.callback(source.close)
    return source


def _find_weights(folder: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (folder / name).exists() or (folder / name).is_symlink():
            return folder / name
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _LOOKS_LIKE_WEIGHTS)
    hint = f" It has {', '.join(others[:6])}: pass the path of the file itself." if others else ""
    raise InputFileError(f"{folder}: none of {', '.join(_WEIGHT_FILES)} is in this folder.{hint}")


def _read_file(source: FileSource) -> tuple[_Format, dict[str, LazyTensor], Callable[[], dict[str, Any]]]:
    head = source.read(0, min(source.size, 512))
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        torch_file = read_torch(source)
        return "torch", torch_file.tensors, torch_file.read_extra
    problem = _what_else(head, source.path)
    if problem is not None:
        raise CheckpointError(problem, path=source.path, offset=0 if head else None)
    return "safetensors", read_safetensors(source), dict


def _what_else(head: bytes, path: Path) -> str | None:
    """What a file with these first bytes is, and what to do about it; None for what may be safetensors."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights themselves; run `git lfs pull`"
    if head.startswith((b"GGUF", b"FUGG")):
        return "this is a GGUF file, already converted; open it with azquant.open_gguf or azquant.load"
    if head.startswith(_OLD_GGML):
        return "this is a ggml file from before GGUF, which is not supported; convert the original checkpoint"
    if head[4:8] == bytes(4) and head[8:9] in (b"{", b" ", b"\t", b"\r", b"\n"):
        return None
    if head[257:262] == b"ustar":
        return (
            "this is a tar archive. If torch before 0.4 wrote it, and only if you trust it (loading it runs "
            "what it says), save it anew: torch.save(torch.load(path, weights_only=False), path)"
        )
    if head[:1] == b"\x80" and head[2:].startswith(_OLD_TORCH):
        return f"this is the format of torch before 1.6, which is not read; {_RESAVE}"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return f"this is a bare pickle, which is not read; if torch wrote it, {_RESAVE}"
    text = _as_text(head)
    if text is not None:
        if text.startswith("<"):
            return "this is an HTML or XML page: the download saved a web page instead of the file"
        return f"this is a text file, not weights; it starts with {text.splitlines()[0]!r}"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "this is no zip archive as torch.save writes it; it may be damaged or another program's file"
    return None


def _as_text(head: bytes) -> str | None:
    """The first 60 bytes as text, or None when they are none (a safetensors header length holds NULs)."""
    try:
        text = getincrementaldecoder("utf-8")().decode(head[:60]).strip()
    except UnicodeDecodeError:
        return None
    return text if text and all(c.isprintable() or c in "\r\n\t" for c in text) else None


def _open_sharded(
    index: Path, opened: ExitStack
) -> tuple[_Format, dict[str, LazyTensor], list[FileSource], Callable[[], dict[str, Any]]]:
    weight_map = read_object(index, MAX_INDEX_BYTES, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError("no weight_map from tensor names to shard files", path=index)
    names: list[str] = list(dict.fromkeys(weight_map.values()))
    if not names:
        raise CheckpointError("the weight_map is empty", path=index)
    shards: dict[str, dict[str, LazyTensor]] = {}
    sources: list[FileSource] = []
    formats: set[_Format] = set()
    for name in names:
        shard = _shard_path(name, index)
        try:
            source = _open(shard, opened)
        except InputFileError as e:
            raise InputFileError(f"{index}: its shard {name!r} cannot be read: {e}") from e
        format, shards[name], _ = _read_file(source)
        sources.append(source)
        formats.add(format)
    if len(formats) > 1:
        raise CheckpointError("its shards mix safetensors and torch files", path=index)
    return formats.pop(), _join(weight_map, shards, index), sources, dict


def _shard_path(name: str, index: Path) -> Path:
    """The path of shard ``name``, which must lie in the folder of its index.

    The file itself may be a link, as in the Hugging Face cache, where every file links to ../../blobs.
    """
    # One spelling per file, and none that any system reads as "elsewhere".
    parts = PureWindowsPath(name).parts
    if PurePosixPath(name).as_posix() != name or ".." in parts or PureWindowsPath(name).anchor:
        raise CheckpointError(f"shard {name!r} is no plain path within the folder of the index", path=index)
    path = index.parent / name
    try:
        inside = path.parent.resolve().is_relative_to(index.parent.resolve())
    except (OSError, RuntimeError, ValueError) as e:  # links in a circle; no possible file name
        raise InputFileError(f"{index}: its shard {name!r} cannot be read: {e}") from e
    if not inside:
        raise CheckpointError(f"shard {name!r} leaves the folder of the index through a link", path=index)
    return path


def _join(
    weight_map: dict[str, str], shards: dict[str, dict[str, LazyTensor]], index: Path
) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"tensor {name!r} is not in the shard {shard!r} the index names", path=index
            )
        tensors[name] = shards[shard][name]
    for shard, held in shards.items():
        for name, tensor in held.items():
            if name not in weight_map and tensors.setdefault(name, tensor) is not tensor:
                raise CheckpointError(
                    f"tensor {name!r} is in {tensors[name].file.name!r} and in {shard!r}; "
                    "the index names neither",
                    path=index,
                )
    return tensors
