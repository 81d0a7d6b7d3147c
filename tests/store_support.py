"""Stores and models put together by hand, from Ollama's documentation alone."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf_builder as b

LIBRARY = ("registry.ollama.ai", "library")
IMAGE = "application/vnd.ollama.image."
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tiny_gguf(fill: float = 1.0, *, name: str = "tiny", rows: int = 4) -> bytes:
    """A well-formed GGUF file with two F32 tensors; nothing an engine could run."""
    pairs = [
        b.pair("general.architecture", b.STRING, b.text("llama")),
        b.pair("general.name", b.STRING, b.text(name)),
        b.pair("general.license", b.STRING, b.text("mit")),
        b.pair("general.file_type", b.U32, struct.pack("<I", 0)),
    ]
    infos = [b.info("a.weight", [8, rows], offset=0), b.info("b.weight", [8], offset=32 * rows)]
    same = struct.pack("<8f", *range(8))
    return b.gguf(pairs, infos, struct.pack("<f", fill) * (8 * rows) + same)


def write_gguf_file(path: Path, fill: float = 1.0, **kwargs: Any) -> Path:
    path.write_bytes(tiny_gguf(fill, **kwargs))
    return path


def put_blob(root: Path, data: bytes) -> str:
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / digest(data).replace(":", "-")).write_bytes(data)
    return digest(data)


def put_model(
    root: Path, name: str, tag: str, layers: list[tuple[str, bytes]], *, where: tuple[str, str] = LIBRARY
) -> Path:
    """A model as Ollama lays it out; ``layers``: the last word of the media type, and the bytes."""
    entries = [
        {"mediaType": IMAGE + kind, "digest": put_blob(root, data), "size": len(data)}
        for kind, data in layers
    ]
    config = json.dumps(
        {
            "model_format": "gguf",
            "model_family": "llama",
            "model_families": ["llama"],
            "model_type": "40",
            "file_type": "F32",
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [entry["digest"] for entry in entries]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": put_blob(root, config), "size": len(config)},
        "layers": entries,
    }
    path = root.joinpath("manifests", *where, name, tag)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
    return path


def blobs(root: Path) -> set[str]:
    return {path.name.replace("-", ":", 1) for path in (root / "blobs").iterdir()}


def files(root: Path) -> dict[str, bytes]:
    """Everything in a store but its lock."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".azquant.lock"
    }
