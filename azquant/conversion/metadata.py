"""The ``general.*`` keys of a converted file: what the model is called, its size, where it came from.

They and the tokenizer's keys are those that llama.cpp's converter writes, with the same values (the tests
compare them). Where azquant differs, it does so on purpose:

- ``general.basename``, ``finetune``, ``version``: the parts of the name as the GGUF naming convention has
  them. The other converter leaves a size that is not the model's in ``finetune`` (``134m-chat``) and takes
  any number for a version (``Llama-2-v2`` is ``Llama`` of version ``2-v2``).
- ``general.sampling.*``: only where generation_config.json samples (``do_sample``).
- ``general.file_type``, ``general.quantization_version``: of the file written.
- ``tokenizer.ggml.add_bos_token``, ``add_eos_token``, ``add_space_prefix``: written where the default would
  do as well, since defaults are the reader's; ``unknown_token_id``: also of a tokenizer.model.
- ``tokenizer.ggml.scores`` of a BPE: minus the rank of the merge that makes a token, and -1e9 where none
  does, which llama.cpp would otherwise make first. The other converter copies those of a tokenizer.model, in
  which they have the same order, and of a tokenizer.json knows none (-1000 for all).
- ``tokenizer.ggml.token_type``: ``<unk>`` is the unknown token there too, not a control token.
- ``tokenizer.huggingface.json``: the tokenizer itself, so that a file loses nothing of it.
- ``azquant.*``: version, and the names and hashes of the files converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from azquant._version import __version__
from azquant.checkpoint.jsonfile import read_object
from azquant.conversion.recipe import Target
from azquant.gguf import MetadataValue, ValueType, keys

__all__ = ["general_metadata", "model_card", "size_label", "source_metadata"]

_SIZE = re.compile(r"(A|\d+x)?\d+(\.\d+)?[KMBT]", re.IGNORECASE)
_SIZE_OF_MIXTURE = re.compile(r"A\d.*|\d+x.*", re.IGNORECASE)  # active weights; experts x weights
_VERSION = re.compile(r"v\d+(\.\d+)*", re.IGNORECASE)
_CARD_LIMIT = 1 << 20
_LICENSES = {"license": keys.LICENSE, "license_name": keys.LICENSE_NAME, "license_link": keys.LICENSE_LINK}
_FROM_CARD = {
    "author": keys.AUTHOR,
    "model_creator": keys.AUTHOR,
    "organization": keys.ORGANIZATION,
    "description": keys.DESCRIPTION,
}
_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Of generation_config.json, and the same in llama.cpp's words."""
_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION


def general_metadata(
    folder: Path,
    config: Mapping[str, Any],
    architecture: str,
    target: Target,
    size: str,
    source_format: str,
    *,
    version: str | None = None,
    base_model: str = "",
) -> tuple[dict[str, MetadataValue], dict[str, MetadataValue]]:
    """What stands before the architecture's own keys, and what follows them.

    ``folder`` gives the name (unless ``config`` has a model id in ``_name_or_path``) and the model card.
    ``size`` is the :func:`size_label`; a mixture's gives way to one in its name (8x7B, 30B-A3B).
    ``version`` overrules the one that the name shows. ``base_model`` is what an adapter was trained on; else
    the card says it.
    """
    owner, model_id = _model_id(config.get("_name_or_path"))
    model_id = model_id or folder.resolve().name or architecture
    name, parts = _name_parts(model_id)
    if owner:
        parts[keys.ORGANIZATION] = _title(owner)
    if version is not None:
        parts[keys.VERSION] = version
    before = {
        keys.ARCHITECTURE: keys.string(architecture),
        keys.TYPE: keys.string("model"),
        keys.NAME: keys.string(name),
        **{key: keys.string(value) for key, value in parts.items()},
        keys.SIZE_LABEL: keys.string(_mixture_size(model_id, size)),
    }
    card = model_card(folder / "README.md")
    for entry, key in _FROM_CARD.items():
        if entry in card:
            before[key] = keys.string(card[entry][0])
    for entry, key in _LICENSES.items():
        if entry in card:
            before[key] = keys.string(",".join(card[entry]))
    before |= _relatives("base_model", card.get("base_model") or ([base_model] if base_model else []))
    before |= _relatives("dataset", card.get("datasets") or card.get("dataset") or [])
    before |= _sampling(folder)
    tags = [*card.get("tags", ()), *card.get("pipeline_tag", ())]
    if tags:
        before[keys.TAGS] = keys.array(ValueType.STRING, tags)
    languages = card.get("language") or card.get("languages")
    if languages:
        before[keys.LANGUAGES] = keys.array(ValueType.STRING, languages)
    after = {
        keys.FILE_TYPE: keys.u32(target.file_type),
        keys.QUANTIZATION_VERSION: keys.u32(_QUANTIZATION_VERSION),
        "azquant.version": keys.string(__version__),
        "azquant.source.name": keys.string(model_id),
        "azquant.source.format": keys.string(source_format),
    }
    return before, after


def _relatives(kind: str, named: Sequence[str]) -> dict[str, MetadataValue]:
    """What the weights were made from, as the GGUF specification has it; only ids of the Hub, no paths."""
    ids = [entry for entry in named if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", entry)]
    found: dict[str, MetadataValue] = {f"general.{kind}.count": keys.u32(len(ids))} if ids else {}
    for i, entry in enumerate(ids):
        owner, _, model_id = entry.partition("/")
        name, parts = _name_parts(model_id)
        found[f"general.{kind}.{i}.name"] = keys.string(name)
        if keys.VERSION in parts:
            found[f"general.{kind}.{i}.version"] = keys.string(parts[keys.VERSION])
        found[f"general.{kind}.{i}.organization"] = keys.string(_title(owner))
        found[f"general.{kind}.{i}.repo_url"] = keys.string(f"https://huggingface.co/{entry}")
    return found


def _sampling(folder: Path) -> dict[str, MetadataValue]:
    """How generation_config.json samples, in llama.cpp's keys; greedy decoding says nothing of it."""
    path = folder / "generation_config.json"
    config = read_object(path, _CARD_LIMIT) if path.is_file() else {}
    if config.get("do_sample") is not True:
        return {}
    found: dict[str, MetadataValue] = {}
    for key, name in _SAMPLING.items():
        value = config.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
            found[f"general.sampling.{name}"] = keys.f32(float(value))
    top_k = config.get("top_k")
    if isinstance(top_k, int) and not isinstance(top_k, bool) and 0 <= top_k < 1 << 31:
        found["general.sampling.top_k"] = keys.i32(top_k)
    return found


def source_metadata(files: Sequence[Path], hashes: Sequence[str]) -> dict[str, MetadataValue]:
    """The names and SHA-256 of the files that were converted: what ``sha256sum`` and the Hub show."""
    return {
        "azquant.source.files": keys.array(ValueType.STRING, [path.name for path in files]),
        "azquant.source.sha256": keys.array(ValueType.STRING, list(hashes)),
    }


def _mixture_size(model_id: str, size: str) -> str:
    named = [piece for piece in model_id.split("-")[1:] if _SIZE.fullmatch(piece)]
    if "x" not in size or not any(_SIZE_OF_MIXTURE.fullmatch(piece) for piece in named):
        return size
    return "-".join(piece[:-1] + piece[-1].upper() for piece in named)


def size_label(parameters: int, experts: int = 0) -> str:
    """A parameter count as GGUF names write it, two digits at least: ``"134M"``, ``"5.9M"``, ``"260K"``.

    With ``experts``, ``parameters`` are those outside them and of one, and their number leads: ``"8x13B"``.
    """
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
    unit, suffix = next((row for row in units if parameters > row[0]), (1e3, "K"))
    count = parameters / unit
    whole = len(str(round(count))) if round(count) else 0
    return f"{f'{experts}x' if experts else ''}{count:.{max(0, 2 - whole)}f}{suffix}"


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


def _model_id(name_or_path: Any) -> tuple[str, str]:
    """Owner (or "") and name if ``_name_or_path`` is a model's id and no path of some machine."""
    if isinstance(name_or_path, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name_or_path):
        owner, _, name = name_or_path.rpartition("/")
        return owner, name
    return "", ""


def _title(model_id: str) -> str:
    """An id's words as people read them: what is written in small letters gets a capital one."""
    return " ".join(
        word.title() if word.islower() and not _VERSION.fullmatch(word) and not word[0].isdigit() else word
        for word in model_id.replace("-", " ").split()
    )


def _name_parts(model_id: str) -> tuple[str, dict[str, str]]:
    """A readable name, and base name, finetune and version where the GGUF naming convention shows them.

    ``az-llm-134m-chat-v1.0`` is "Az Llm 134m Chat v1.0", base name az-llm, finetune chat, version v1.0.
    Without a size or version in the name nothing tells the parts apart, and only the name is given.
    """
    name = _title(model_id)
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
