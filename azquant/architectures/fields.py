"""Reading hyperparameters out of a mapping, checked: the one place that judges a config's single values.

The same reader serves a Hugging Face ``config.json`` (errors are ConversionError) and the metadata of a GGUF
file (errors are ModelError), so both sides of an architecture refuse the same nonsense in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, NoReturn

from azquant.errors import AzquantError, ConversionError, ModelError

__all__ = ["MAX_BLOCKS", "MAX_SIZE", "Fields", "gguf_fields", "gguf_vocab_size", "hf_fields"]

MAX_BLOCKS = 512
"""Most layers a model may have (llama.cpp's LLAMA_MAX_LAYERS)."""
MAX_SIZE = 1 << 24
"""Largest value of any other size. No model comes near it, and products of two of them stay exact."""

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Fields:
    """A mapping of hyperparameters, and how to complain about it.

    Every getter takes one key or several spellings of it (the first one present counts), treats ``None`` as
    absent, and raises ``error`` naming the key, the value found and what was expected.
    """

    values: Mapping[str, Any]
    where: str
    """What the mapping is, for messages: ``"config.json"``."""
    error: type[AzquantError]
    prefix: str = ""
    """Put before every key: ``"llama."``."""

    def fail(self, message: str) -> NoReturn:
        """Raise this mapping's error: ``message`` after the name of the mapping."""
        raise self.error(f"{self.where}: {message}")

    def has(self, *keys: str) -> bool:
        """Whether one of ``keys`` is present with a value."""
        return any(self.values.get(self.prefix + key) is not None for key in keys)

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            value = self.values.get(self.prefix + key)
            if value is not None:
                return self.prefix + key, value
        if default is _REQUIRED:
            names = " or ".join(self.prefix + key for key in keys)
            self.fail(f"{names} is missing")
        return self.prefix + keys[0], default

    def integer(self, *keys: str, default: Any = _REQUIRED, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer from ``low`` to ``high``."""
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"{key} is {_show(value)}, not an integer")
        if not low <= value <= high:
            self.fail(f"{key} is {value}, outside {low} to {high}")
        return int(value)

    def number(self, *keys: str, default: Any = _REQUIRED) -> float:
        """A finite number above zero."""
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(f"{key} is {_show(value)}, not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{key} is {_show(value)}, not a finite number above zero")
        return number

    def flag(self, *keys: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        key, value = self._find(keys, default)
        if not isinstance(value, bool):
            self.fail(f"{key} is {_show(value)}, not true or false")
        return value

    def text(self, *keys: str, default: Any = _REQUIRED) -> str:
        """A string."""
        key, value = self._find(keys, default)
        if not isinstance(value, str):
            self.fail(f"{key} is {_show(value)}, not a string")
        return value

    def section(self, *keys: str) -> Fields | None:
        """A nested mapping, or ``None`` when absent."""
        key, value = self._find(keys, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(f"{key} is {_show(value)}, not an object")
        return Fields(value, f"{self.where}: {key}", self.error)

    def divides(self, small: int, small_key: str, large: int, large_key: str) -> int:
        """``large // small``, refused unless it leaves no remainder."""
        if large % small:
            self.fail(
                f"{self.prefix}{large_key} {large} is not a multiple of {self.prefix}{small_key} {small}"
            )
        return large // small


def hf_fields(config: Mapping[str, Any]) -> Fields:
    """Fields of a Hugging Face ``config.json``; errors are ConversionError."""
    return Fields(config, "config.json", ConversionError)


def gguf_fields(metadata: Mapping[str, Any], architecture: str) -> Fields:
    """Fields ``<architecture>.*`` of a GGUF file's metadata (plain Python values); errors are ModelError."""
    return Fields(metadata, "GGUF metadata", ModelError, prefix=f"{architecture}.")


def gguf_vocab_size(fields: Fields) -> int:
    """Rows of the embedding: the token list's length, or ``<arch>.vocab_size`` where there is none."""
    tokens = fields.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sized) and not isinstance(tokens, str) and len(tokens) > 0:
        return Fields({"tokenizer.ggml.tokens": len(tokens)}, fields.where, fields.error).integer(
            "tokenizer.ggml.tokens"
        )
    return fields.integer("vocab_size")


def _show(value: Any) -> str:
    """``value`` as it may stand in a message: never longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
