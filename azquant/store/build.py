"""Making a model: the blobs and the manifest that a Modelfile, or a GGUF file alone, asks for.

The layers come in Ollama's order, with its bytes: model, adapter, template, system, license, params,
messages. From a model in the store everything is taken over; a template, system text and conversation
replace the old one, parameters replace those of the same name, licences are added.

Source: docs/modelfile and docs/import of Ollama.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from azquant.errors import (
    ArgumentError,
    ConversionError,
    InputFileError,
    ModelError,
    ModelfileError,
    ModelNotFoundError,
)
from azquant.gguf import GGUFFile, keys, open_gguf, type_totals
from azquant.store import go_json
from azquant.store import manifest as media
from azquant.store.info import read_config, read_parameters
from azquant.store.layout import Layout, Progress
from azquant.store.manifest import Layer, Manifest
from azquant.store.modelfile import Modelfile, parse_modelfile
from azquant.store.names import ModelName

__all__ = ["build", "config_for", "recipe_for"]

# general.file_type of mixtures, which have no type of that name; as llama.cpp numbers them.
_MIXTURES = {
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
}


def recipe_for(path: Path) -> Modelfile:
    """What a GGUF file alone is made into: with the settings that can be told from its metadata."""
    from azquant.conversion.modelfile import modelfile_text  # only whoever adds a model waits for conversion

    with open_gguf(path) as file:
        try:
            found = parse_modelfile(modelfile_text(file.metadata, "model.gguf"))
        except ModelError:  # no context length, as of a vocabulary alone: nothing to set
            found = Modelfile()
    found.sources = [str(path)]
    return found


def build(layout: Layout, modelfile: Modelfile, folder: Path, progress: Progress | None = None) -> bytes:
    """The bytes of the manifest, whose blobs are in the store then. Call it within ``layout.adding()``.

    ``folder`` is where relative paths of the Modelfile begin. Raises what reading its files raises.
    """
    layers, config = _base(layout, modelfile, folder, progress)
    for text in modelfile.adapters:
        layers.append(_adapter(layout, _path(text, folder), progress))
    layers = _overlay(layout, layers, modelfile)
    for word in ("renderer", "parser", "requires"):
        if value := getattr(modelfile, word):
            config[word] = value
    if modelfile.capabilities:
        config["capabilities"] = list(dict.fromkeys(modelfile.capabilities))
    config["rootfs"] = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    blob = layout.add_bytes(go_json.encode(config), media.CONFIG)
    return Manifest(blob, tuple(layers)).encode()


def _base(
    layout: Layout, modelfile: Modelfile, folder: Path, progress: Progress | None
) -> tuple[list[Layer], dict[str, Any]]:
    if len(modelfile.sources) != 1 or "*" in modelfile.sources[0]:
        raise ArgumentError(
            "FROM names several files: a model that is split must be merged into one file first"
        )
    (text,) = modelfile.sources
    path = _path(text, folder)
    if path.is_dir():
        raise ConversionError(
            f"FROM {path} is a folder; run `azquant convert {path} FILE.gguf` first, and name the file"
        )
    if not path.exists():
        return _inherit(layout, text, path)
    with open_gguf(path) as file:
        if len(file.paths) > 1:
            raise ConversionError(f"FROM {path} is one of {len(file.paths)} files; run `azquant merge` first")
        config = config_for(file)
        if file.metadata.get(keys.TYPE) == "adapter":
            raise ModelfileError(
                f"FROM {path} is a LoRA adapter; FROM names its base model, ADAPTER the adapter"
            )
    # The checked header is that of the blob too: add_file refuses a file that changes.
    return [layout.add_file(path, media.MODEL, progress)], config


def _inherit(layout: Layout, text: str, path: Path) -> tuple[list[Layer], dict[str, Any]]:
    try:
        found, _, _ = layout.manifest(ModelName.parse(text))
    except (ArgumentError, ModelNotFoundError):
        raise InputFileError(
            f"FROM {text}: there is neither a file {path} nor such a model in {layout.root}"
        ) from None
    for layer in found.blobs():
        layout.blob(layer)
    config = read_config(layout, found)
    config.pop("rootfs", None)
    return list(found.layers), config


def _adapter(layout: Layout, path: Path, progress: Progress | None) -> Layer:
    with open_gguf(path) as file:
        if file.metadata.get(keys.TYPE) != "adapter":
            raise ModelfileError(f"ADAPTER {path} is no LoRA adapter (its general.type is another)")
    return layout.add_file(path, media.ADAPTER, progress)


def _overlay(layout: Layout, layers: list[Layer], modelfile: Modelfile) -> list[Layer]:
    if modelfile.template:
        layers = _without(layers, media.TEMPLATE, media.PROMPT)
        layers.append(layout.add_bytes(modelfile.template.encode(), media.TEMPLATE))
    if modelfile.system:
        layers = _without(layers, media.SYSTEM)
        layers.append(layout.add_bytes(modelfile.system.encode(), media.SYSTEM))
    for text in modelfile.licenses:
        layer = layout.add_bytes(text.encode(), media.LICENSE)
        if layer not in layers:
            layers.append(layer)
    if modelfile.parameters:
        parameters: dict[str, Any] = {}
        for layer in layers:
            if layer.media_type == media.PARAMS:
                parameters.update(read_parameters(layout, layer))
        parameters.update(modelfile.parameters)
        layers = _without(layers, media.PARAMS)
        layers.append(layout.add_bytes(go_json.encode(dict(sorted(parameters.items()))), media.PARAMS))
    if modelfile.messages:
        layers = _without(layers, media.MESSAGES)
        messages = [{"role": message.role, "content": message.content} for message in modelfile.messages]
        layers.append(layout.add_bytes(go_json.encode(messages), media.MESSAGES))
    return layers


def _without(layers: list[Layer], *media_types: str) -> list[Layer]:
    return [layer for layer in layers if layer.media_type not in media_types]


def _path(text: str, folder: Path) -> Path:
    """A path of a Modelfile: from the home folder, or from the folder the Modelfile is in."""
    if "\0" in text:
        raise ArgumentError(f"{text!r} is no path")
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:
        raise InputFileError(f"{text}: there is no such home folder") from None


def config_for(file: GGUFFile) -> dict[str, Any]:
    """What Ollama's config blob says of a GGUF file, in its order; the layers' digests come last."""
    metadata = file.metadata
    family = metadata.get(keys.ARCHITECTURE)
    if not isinstance(family, str):
        raise ArgumentError(f"{file.path}: general.architecture is missing; this is no model")
    types = type_totals(file.tensors)
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": human_count(sum(total["parameters"] for total in types.values())),
        "file_type": _file_type(metadata.get(keys.FILE_TYPE), types),
        "architecture": "amd64",
        "os": "linux",
    }


def _file_type(number: Any, types: dict[str, dict[str, int]]) -> str:
    names = {value: name.upper() for name, value in keys.FILE_TYPES.items()} | _MIXTURES
    if isinstance(number, int) and number in names:
        return names[number]
    return next(iter(types), "unknown").upper()


def human_count(n: int) -> str:
    """A number of parameters as Ollama writes it: ``"134.52M"``, ``"3.2B"``."""
    for size, unit, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if n >= size:
            return f"{n // size}{unit}" if n % size == 0 else f"{n / size:.{digits}f}{unit}"
    return f"{n / 1000:.0f}K" if n >= 1000 else str(n)
