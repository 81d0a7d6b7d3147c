"""The ``general.*`` keys of a converted file: what the model is called, its size, where it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from azquant._version import __version__
from azquant.gguf import MetadataValue, ValueType, keys
from azquant.types import GGMLType

__all__ = ["general_metadata", "model_card", "size_label"]

_SIZE = re.compile(r"\d+(\.\d+)?[KMBT]", re.IGNORECASE)
_VERSION = re.compile(r"v\d+(\.\d+)*", re.IGNORECASE)
_CARD_LIMIT = 1 << 20
_LICENSES = {"license": keys.LICENSE, "license_name": keys.LICENSE_NAME, "license_link": keys.LICENSE_LINK}
_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION


def general_metadata(
    folder: Path,
    config: Mapping[str, Any],
    architecture: str,
    type_: GGMLType,
    parameters: int,
    source_format: str,
) -> tuple[dict[str, MetadataValue], dict[str, MetadataValue]]:
    """What stands before the architecture's own keys, and what follows them.

    ``folder`` gives the name (unless ``config`` has a model id in ``_name_or_path``) and the model card.
    """
    model_id = _model_id(config.get("_name_or_path")) or folder.resolve().name or architecture
    name, parts = _name_parts(model_id)
    before = {
        keys.ARCHITECTURE: keys.string(architecture),
        keys.TYPE: keys.string("model"),
        keys.NAME: keys.string(name),
        **{key: keys.string(value) for key, value in parts.items()},
        keys.SIZE_LABEL: keys.string(size_label(parameters)),
    }
    card = model_card(folder / "README.md")
    for entry, key in _LICENSES.items():
        if entry in card:
            before[key] = keys.string(",".join(card[entry]))
    languages = card.get("language") or card.get("languages")
    if languages:
        before[keys.LANGUAGES] = keys.array(ValueType.STRING, languages)
    after = {
        keys.FILE_TYPE: keys.u32(keys.FILE_TYPES[type_.name]),
        keys.QUANTIZATION_VERSION: keys.u32(_QUANTIZATION_VERSION),
        "azquant.version": keys.string(__version__),
        "azquant.source.name": keys.string(model_id),
        "azquant.source.format": keys.string(source_format),
    }
    return before, after


def size_label(parameters: int) -> str:
    """A parameter count as GGUF names write it, two digits at least: ``"134M"``, ``"5.9M"``, ``"260K"``."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
    unit, suffix = next((row for row in units if parameters > row[0]), (1e3, "K"))
    count = parameters / unit
    whole = len(str(round(count))) if round(count) else 0
    return f"{count:.{max(0, 2 - whole)}f}{suffix}"


def model_card(path: Path) -> dict[str, list[str]]:
    """The front matter of a model card: each key's values, a single one as a list of one.

    Only what cards use is read: ``key: value``, ``key: [a, b]`` and ``- item`` lines under a key. Anything
    else is skipped; a card that is missing, huge or not UTF-8 is an empty one.
    """
    try:
        if not path.is_file() or path.stat().st_size > _CARD_LIMIT:
            return {}
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[str, list[str]] = {}
    if not lines or lines[0].strip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return {}
    current: list[str] | None = None
    for line in lines[1:]:
        if line.rstrip() == "---":
            break
        item = re.fullmatch(r"\s*-\s+(.+)", line)
        pair = re.fullmatch(r"([A-Za-z_][\w-]*):\s*(.*)", line)
        if item and current is not None:
            current.append(_scalar(item[1]))
        elif pair:
            current = found[pair[1].lower()] = []
            value = pair[2].strip()
            if value.startswith("[") and value.endswith("]"):
                current.extend(_scalar(part) for part in value[1:-1].split(",") if part.strip())
            elif value and value[0] not in "|>&*{#":
                current.append(_scalar(value))
        elif line.strip():
            current = None  # a nested mapping or a block of text
    return {key: values for key, values in found.items() if values}


def _scalar(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text.split(" #")[0].rstrip()


def _model_id(name_or_path: Any) -> str:
    """``_name_or_path`` where it is a model's id (``name`` or ``owner/name``) and no path of some machine."""
    if isinstance(name_or_path, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name_or_path):
        return name_or_path.split("/")[-1]
    return ""


def _name_parts(model_id: str) -> tuple[str, dict[str, str]]:
    """A readable name, and base name, finetune and version where the GGUF naming convention shows them.

    ``az-llm-134m-chat-v1.0`` is "Az Llm 134m Chat v1.0", base name az-llm, finetune chat, version v1.0.
    Without a size or version in the name nothing tells the parts apart, and only the name is given.
    """
    words = model_id.replace("-", " ").split()
    name = " ".join(
        word.title() if word.islower() and not _VERSION.fullmatch(word) and not word[0].isdigit() else word
        for word in words
    )
    pieces = [piece for piece in model_id.split("-") if piece]
    sizes = [i for i, piece in enumerate(pieces) if i and _SIZE.fullmatch(piece)]
    versions = [i for i, piece in enumerate(pieces) if i and _VERSION.fullmatch(piece)]
    if not sizes and not versions:
        return name, {}
    end = min(sizes[:1] + versions[-1:])
    marked = set(sizes + versions[-1:])
    rest = [piece for i, piece in enumerate(pieces) if i > end and i not in marked]
    parts = {keys.BASENAME: "-".join(pieces[:end])}
    if rest:
        parts[keys.FINETUNE] = "-".join(rest)
    if versions:
        parts[keys.VERSION] = pieces[versions[-1]]
    return name, parts
