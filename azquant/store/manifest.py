"""Manifests: the small JSON file that says which blobs a model is made of.

Source: the schema of Docker's registry (image manifest, version 2), with Ollama's media types for the layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from azquant.errors import StoreError
from azquant.store import go_json

__all__ = ["Layer", "Manifest", "is_digest", "parse_manifest"]

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.ollama.manifest.list.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
MODEL = "application/vnd.ollama.image.model"
ADAPTER = "application/vnd.ollama.image.adapter"
TEMPLATE = "application/vnd.ollama.image.template"
PROMPT = "application/vnd.ollama.image.prompt"  # the template's old name
SYSTEM = "application/vnd.ollama.image.system"
PARAMS = "application/vnd.ollama.image.params"
MESSAGES = "application/vnd.ollama.image.messages"
LICENSE = "application/vnd.ollama.image.license"

LARGEST_MANIFEST = 4 << 20
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})", re.ASCII)


def is_digest(text: Any) -> bool:
    """Whether ``text`` is ``sha256:`` and 64 hexadecimal digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob that belongs to a model, and what it is."""

    media_type: str
    digest: str
    """``sha256:`` and 64 digits."""
    size: int
    """In bytes."""

    def as_dict(self) -> dict[str, Any]:
        """As in the manifest."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The layers of a model, and its config blob (None in a manifest that lists others)."""

    config: Layer | None
    layers: tuple[Layer, ...]
    children: tuple[str, ...] = ()
    """Digests of manifests that are blobs themselves: what a manifest list refers to."""

    def encode(self) -> bytes:
        """The bytes Ollama would write."""
        assert self.config is not None
        return go_json.encode(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self.config.as_dict(),
                "layers": [layer.as_dict() for layer in self.layers],
            }
        )

    def blobs(self) -> Iterator[Layer]:
        """Layers and config."""
        yield from self.layers
        if self.config is not None:
            yield self.config

    def of_type(self, *media_types: str) -> list[Layer]:
        """The layers that are one of these."""
        return [layer for layer in self.layers if layer.media_type in media_types]


def parse_manifest(data: bytes, path: str | PathLike[str]) -> Manifest:
    """The manifest in ``data``; ``path`` is named in errors.

    Raises StoreError for what is no manifest, or refers to a blob by something else than its SHA-256.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"this manifest is not JSON ({error})", path=path) from None
    return _manifest(value, path)


def _manifest(value: Any, path: str | PathLike[str]) -> Manifest:
    if not isinstance(value, dict) or value.get("schemaVersion") != 2:
        raise StoreError("this is no manifest of schemaVersion 2", path=path)
    if value.get("mediaType") == MANIFEST_LIST:
        return _list(value, path)
    layers = value.get("layers")
    if not isinstance(layers, list):
        raise StoreError("the manifest has no list of layers", path=path)
    return Manifest(
        _layer(value.get("config"), "config", path),
        tuple(_layer(layer, f"layers[{i}]", path) for i, layer in enumerate(layers)),
    )


def _list(value: dict[str, Any], path: str | PathLike[str]) -> Manifest:
    """Several manifests, one for each runner: the layers of all that are written out in it."""
    entries = value.get("manifests")
    if not isinstance(entries, list):
        raise StoreError("the manifest list has no manifests", path=path)
    layers: list[Layer] = []
    children = []
    for i, entry in enumerate(entries):
        if isinstance(entry, dict) and "layers" not in entry and is_digest(entry.get("digest")):
            children.append(_canonical(entry["digest"]))
            continue
        if not isinstance(entry, dict) or entry.get("mediaType") == MANIFEST_LIST:
            raise StoreError(f"manifests[{i}] is no manifest", path=path)
        layers += _manifest({"schemaVersion": 2, **entry}, path).blobs()
    return Manifest(None, tuple(layers), tuple(children))


def _layer(value: Any, where: str, path: str | PathLike[str]) -> Layer:
    if not isinstance(value, dict):
        raise StoreError(f"{where} of the manifest is missing or no object", path=path)
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str):
        raise StoreError(f"{where}.mediaType of the manifest is no text", path=path)
    if not isinstance(digest, str) or not is_digest(digest):
        raise StoreError(
            f"{where}.digest of the manifest is {digest!r:.90}, not sha256: and 64 digits", path=path
        )
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise StoreError(f"{where}.size of the manifest is {size!r:.40}, no number of bytes", path=path)
    return Layer(media_type, _canonical(digest), size)


def _canonical(digest: str) -> str:
    return digest.lower().replace("-", ":", 1)
