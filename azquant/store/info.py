"""What a model in the store is: read from its manifest, its small layers and the header of its GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from azquant.errors import AzquantError, StoreError
from azquant.gguf import GGUFArray, keys, open_gguf, type_totals
from azquant.store import manifest as media
from azquant.store.layout import Layout, sha256
from azquant.store.manifest import Layer, Manifest
from azquant.store.modelfile import ROLES, Message, Modelfile
from azquant.store.names import ModelName

__all__ = ["ModelInfo", "ModelRow", "read_info", "read_row"]


@dataclass(frozen=True)
class ModelRow:
    """A line of the list of models."""

    name: ModelName
    digest: str
    """SHA-256 of the manifest: equal for models that are the same in everything."""
    size: int
    """Bytes of all its blobs; models may share some."""
    modified: datetime
    """When its manifest was written, in UTC."""
    architecture: str | None = None
    type: str | None = None
    """The type most of its bytes are in: ``"q4_0"``."""
    parameters: int | None = None
    bits_per_weight: float | None = None
    problem: str | None = None
    """Why the facts above are missing, if they are."""


@dataclass(frozen=True)
class ModelInfo:
    """All about one model."""

    row: ModelRow
    path: Path | None
    """Its GGUF file, a blob of the store; None for a model of another kind."""
    layers: tuple[Layer, ...]
    config: dict[str, Any]
    """What Ollama's config blob says."""
    parameters: dict[str, Any]
    """The parameters it is run with: PARAMETER of its Modelfile."""
    template: str | None
    system: str | None
    licenses: tuple[str, ...]
    messages: tuple[Message, ...]
    metadata: dict[str, Any] = field(repr=False)
    """The keys of the GGUF file, without arrays."""
    types: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tensors, parameters and bytes by type."""
    modelfile: Modelfile = field(default_factory=Modelfile, repr=False)
    """A Modelfile that makes the same model again from the blobs."""

    @property
    def name(self) -> ModelName:
        """Its full name."""
        return self.row.name

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it comes from, as far as its file says: source, version, licence, who quantized it."""
        words = (
            "source",
            "version",
            "license",
            "author",
            "organization",
            "quantized_by",
            "url",
            "base_model",
        )
        return {
            key: value
            for key, value in self.metadata.items()
            if key.startswith("azquant.")
            or (key.startswith("general.") and key.split(".")[1].startswith(words))
        }


def read_row(layout: Layout, name: ModelName) -> ModelRow:
    """A line of the list. Damage is told in ``problem``, so that one bad model does not hide the others."""
    path = layout.find(name)
    modified = _modified(path)
    try:
        found, data, path = layout.manifest(name)
    except AzquantError as error:
        return ModelRow(name, "", 0, modified, problem=str(error))
    size = sum({layer.digest: layer.size for layer in found.blobs()}.values())
    facts: dict[str, Any] = {}
    try:
        if models := found.of_type(media.MODEL):
            with open_gguf(layout.blob(models[0])) as file:
                facts = _facts(type_totals(file.tensors), file.metadata.get(keys.ARCHITECTURE))
    except AzquantError as error:
        facts = {"problem": str(error)}
    return ModelRow(name, sha256(data), size, modified, **facts)


def _modified(path: Path | None) -> datetime:
    try:
        seconds = path.stat().st_mtime if path is not None else 0
    except OSError:
        seconds = 0
    return datetime.fromtimestamp(seconds, timezone.utc)


def _facts(types: dict[str, dict[str, int]], architecture: Any) -> dict[str, Any]:
    parameters = sum(total["parameters"] for total in types.values())
    nbytes = sum(total["bytes"] for total in types.values())
    return {
        "architecture": architecture if isinstance(architecture, str) else None,
        "type": next(iter(types), None),
        "parameters": parameters,
        "bits_per_weight": 8 * nbytes / parameters if parameters else None,
    }


def read_info(layout: Layout, name: ModelName) -> ModelInfo:
    """All about the model. Raises ModelNotFoundError, StoreError, GGUFError (missing or damaged)."""
    found, data, path = layout.manifest(name)
    models = found.of_type(media.MODEL)
    blob = layout.blob(models[0]) if models else None
    metadata: dict[str, Any] = {}
    types: dict[str, dict[str, int]] = {}
    if blob is not None:
        with open_gguf(blob) as file:
            metadata = {k: v for k, v in file.metadata.items() if not isinstance(v, GGUFArray)}
            types = type_totals(file.tensors)
    size = sum({layer.digest: layer.size for layer in found.blobs()}.values())
    row = ModelRow(
        name, sha256(data), size, _modified(path), **_facts(types, metadata.get(keys.ARCHITECTURE))
    )
    config = read_config(layout, found)
    modelfile = read_layers(layout, found, config)
    modelfile.sources = [str(layout.blob_path(layer.digest)) for layer in models]
    modelfile.adapters = [str(layout.blob_path(layer.digest)) for layer in found.of_type(media.ADAPTER)]
    return ModelInfo(
        row=row,
        path=blob,
        layers=found.layers,
        config=config,
        parameters=modelfile.parameters,
        template=modelfile.template if found.of_type(media.TEMPLATE, media.PROMPT) else None,
        system=modelfile.system if found.of_type(media.SYSTEM) else None,
        licenses=tuple(modelfile.licenses),
        messages=tuple(modelfile.messages),
        metadata=metadata,
        types=types,
        modelfile=modelfile,
    )


def read_config(layout: Layout, manifest: Manifest) -> dict[str, Any]:
    """The config blob."""
    if manifest.config is None:
        return {}
    config = _json(layout, manifest.config)
    if not isinstance(config, dict):
        raise StoreError("the config is no JSON object", path=layout.blob_path(manifest.config.digest))
    return config


def read_layers(layout: Layout, manifest: Manifest, config: dict[str, Any]) -> Modelfile:
    """The small layers as a Modelfile without FROM."""
    found = Modelfile()
    for layer in manifest.of_type(media.TEMPLATE, media.PROMPT):
        found.template = _text(layout, layer)
    for layer in manifest.of_type(media.SYSTEM):
        found.system = _text(layout, layer)
    found.licenses = [_text(layout, layer) for layer in manifest.of_type(media.LICENSE)]
    for layer in manifest.of_type(media.PARAMS):
        found.parameters = read_parameters(layout, layer)
    for layer in manifest.of_type(media.MESSAGES):
        found.messages = _messages(layout, layer)
    for word in ("renderer", "parser", "requires"):
        value = config.get(word)
        if isinstance(value, str):
            setattr(found, word, value)
    capabilities = config.get("capabilities")
    if isinstance(capabilities, list):
        found.capabilities = [item for item in capabilities if isinstance(item, str)]
    return found


def read_parameters(layout: Layout, layer: Layer) -> dict[str, Any]:
    """The layer of parameters: name -> value."""
    value = _json(layout, layer)
    if not isinstance(value, dict):
        raise StoreError("the parameters are no JSON object", path=layout.blob_path(layer.digest))
    return value


def _messages(layout: Layout, layer: Layer) -> list[Message]:
    value = _json(layout, layer)
    entries = value if isinstance(value, list) else [None]
    messages = []
    for entry in entries:
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise StoreError(
                "the messages are no list of role and content", path=layout.blob_path(layer.digest)
            )
        messages.append(Message(role, content))
    return messages


def _text(layout: Layout, layer: Layer) -> str:
    return layout.read_small(layer).decode("utf-8", "replace")


def _json(layout: Layout, layer: Layer) -> Any:
    try:
        return json.loads(layout.read_small(layer))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"this layer is not JSON ({error})", path=layout.blob_path(layer.digest)) from None
