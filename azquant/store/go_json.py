"""JSON as Go's encoding/json writes it, byte for byte, so that equal content has Ollama's digest.

Compact, keys of maps sorted (those of structures in their order), ``<``, ``>`` and ``&`` as escapes, numbers
without a trailing ``.0``, a newline at the end (json.Encoder). Source: documentation of Go's encoding/json.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np

__all__ = ["encode", "float32"]

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def float32(value: float) -> float:
    """The number that stands for ``value`` once it went through a float32: fewest digits that tell it."""
    return float(str(np.float32(value)))


def encode(value: Any) -> bytes:
    """``value`` (dict, list, str, bool, int, float, None) with the newline at its end."""
    return (_encode(value) + "\n").encode("utf-8")


def _encode(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_encode(key)}:{_encode(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_encode, value)) + "]"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        # Lone surrogates cannot be encoded; Go has no such strings.
        text = value.encode("utf-8", "replace").decode("utf-8")
        return json.dumps(text, ensure_ascii=False).translate(_ESCAPES)
    return json.dumps(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"JSON has no {value}")
    size = abs(value)
    if value == 0:
        return "-0" if math.copysign(1, value) < 0 else "0"
    if 1e-6 <= size < 1e21:
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, _, exponent = repr(value).partition("e")
    if not exponent:  # Python writes it out where Go does not
        mantissa, _, exponent = f"{Decimal(repr(value)):e}".partition("e")
    sign = "-" if exponent.startswith("-") else "+"
    digits = exponent.lstrip("+-").lstrip("0")
    return f"{mantissa.removesuffix('.0')}e{sign}{digits if sign == '-' else digits.zfill(2)}"
