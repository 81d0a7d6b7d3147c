"""Reads the JSON files of a Hugging Face tokenizer folder, believing nothing about their contents.

Whatever is in the files, the result is well-typed data or a :class:`TokenizerError` that names file and key.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, NoReturn

from azquant.conversion._sentencepiece import read_sentencepiece, tokenizer_json
from azquant.errors import ConversionWarning, InputFileError, TokenizerError

__all__ = ["TokenizerFiles", "expect", "read_tokenizer_files", "short_repr", "warn"]

_GPT2_FILES = ("vocab.json", "merges.txt")
_SENTENCEPIECE_FILE = "tokenizer.model"
_STARTS_WITH_BOS = ("Llama", "CodeLlama", "Gemma")  # what these classes do unless told otherwise


@dataclass
class TokenizerFiles:
    """What a folder says about its tokenizer. ``tokenizer`` is ``None`` when it has none that can be read."""

    folder: Path
    name: str = "tokenizer.json"
    """The file that ``tokenizer`` came from, for messages."""
    tokenizer: dict[str, Any] | None = None
    text: str = ""
    """``tokenizer`` as JSON text; of a tokenizer.json its own text, unchanged."""
    config: dict[str, Any] = field(default_factory=dict)
    special_map: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    chat_template: Any = None
    own_special: dict[str, str] = field(default_factory=dict)
    """Special tokens that the tokenizer's own file names (SentencePiece's does), by kind."""


def warn(message: str) -> None:
    """Issue a :class:`ConversionWarning`."""
    warnings.warn(message, ConversionWarning, stacklevel=3)


def expect(value: object, kind: type | tuple[type, ...], where: str, what: str) -> Any:
    """Return ``value`` if it is of ``kind`` (a bool is no int here), else raise TokenizerError."""
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is int):
        return value
    raise TokenizerError(f"{where} must be {what}, found {type(value).__name__} {short_repr(value)}")


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read every file of the folder ``path`` that has to do with its tokenizer, or the one file ``path``.

    A file called tokenizer.json stands for its folder. One of another name is taken alone: the files beside
    it may be another tokenizer's.

    Raises TokenizerError for a file that is no JSON object, InputFileError for one that cannot be read.
    """
    folder = path
    if not path.is_dir():
        if not path.is_file():
            raise InputFileError(f"{path}: no such tokenizer file or folder")
        folder = path.parent
        if path.name != "tokenizer.json":
            files = TokenizerFiles(folder, path.name)
            if path.suffix == ".model":
                _read_sentencepiece_file(files)
            else:
                files.text = _read_text(path)
                files.tokenizer = _parse(files.text, path)
            return files
    files = TokenizerFiles(folder)
    if (folder / files.name).is_file():
        files.text = _read_text(folder / files.name)
        files.tokenizer = _parse(files.text, folder / files.name)
    elif all((folder / name).is_file() for name in _GPT2_FILES):
        _read_gpt2_files(files)
    elif (folder / _SENTENCEPIECE_FILE).is_file():
        files.name = _SENTENCEPIECE_FILE
        _read_sentencepiece_file(files)
    files.config = _read_optional(folder / "tokenizer_config.json")
    if files.own_special and str(files.config.get("tokenizer_class")).startswith(_STARTS_WITH_BOS):
        files.config.setdefault("add_bos_token", True)
    files.special_map = _read_optional(folder / "special_tokens_map.json")
    files.generation = _read_optional(folder / "generation_config.json")
    files.added = _read_optional(folder / "added_tokens.json")
    files.chat_template = _read_chat_template(folder, files.config)
    return files


def _read_sentencepiece_file(files: TokenizerFiles) -> None:
    """Make of a tokenizer.model the tokenizer.json that says the same, and note its special tokens."""
    path = files.folder / files.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    model = read_sentencepiece(data, str(path))
    files.tokenizer = tokenizer_json(model, str(path))
    files.text = json.dumps(files.tokenizer, ensure_ascii=False)
    files.own_special = {
        kind: model.pieces[i] for kind, i in model.special.items() if 0 <= i < len(model.pieces)
    }


def _read_optional(path: Path) -> dict[str, Any]:
    return _parse(_read_text(path), path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path} is not UTF-8 text (byte {error.start}); is it the right file?"
        ) from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON value")

    try:
        value = json.loads(text, parse_constant=no_constant)
    except RecursionError as error:
        raise TokenizerError(f"{path} is not a usable JSON file: it is nested too deeply") from error
    except ValueError as error:
        raise TokenizerError(f"{path} is not a usable JSON file: {error}. Was it copied whole?") from error
    result: dict[str, Any] = expect(value, dict, str(path), "a JSON object")
    return result


def _read_gpt2_files(files: TokenizerFiles) -> None:
    """Make of vocab.json and merges.txt (the original GPT-2 layout) the tokenizer.json they stand for."""
    vocab_path, merges_path = (files.folder / name for name in _GPT2_FILES)
    lines = _read_text(merges_path).split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = _parse(_read_text(vocab_path), vocab_path)
    # GPT2Tokenizer makes a special token of this one without any file saying so.
    content = "<|endoftext|>"
    added = {"id": vocab.get(content), "content": content, "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    files.name = "vocab.json"
    files.tokenizer = {
        "version": "1.0",
        "added_tokens": [added] if content in vocab else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [line.rstrip("\r") for line in lines if line.strip()],
        },
    }
    files.text = json.dumps(files.tokenizer)


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> Any:
    """The chat template: a file of its own wins over the one in tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    own = _read_optional(folder / "chat_template.json").get("chat_template")
    return config.get("chat_template") if own is None else own
