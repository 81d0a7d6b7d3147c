"""The parameters of a Modelfile: their names, their kinds, and how a text becomes a value.

Source: the table of docs/modelfile, and the options that Ollama's API documents for a model.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

from azquant.errors import ArgumentError
from azquant.store.go_json import float32

__all__ = ["DEPRECATED", "PARAMETERS", "parse_parameter"]

PARAMETERS: dict[str, type] = {
    "draft_num_predict": int,
    "frequency_penalty": float,
    "main_gpu": int,
    "min_p": float,
    "num_batch": int,
    "num_ctx": int,
    "num_gpu": int,
    "num_keep": int,
    "num_predict": int,
    "num_thread": int,
    "presence_penalty": float,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "seed": int,
    "stop": list,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "typical_p": float,
    "use_mmap": bool,
}
"""What each one is; ``list``: texts, one more each time it is given."""

DEPRECATED = frozenset(
    {
        "f16_kv",
        "logits_all",
        "low_vram",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "numa",
        "penalize_newline",
        "tfs_z",
        "use_mlock",
        "vocab_only",
    }
)
"""Names that Ollama still takes, and leaves out."""

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


def parse_parameter(name: str, text: str) -> Any:
    """The value of the parameter ``name`` written as ``text``.

    Raises ArgumentError for a name that is not known (with the one that may be meant) or a wrong value.
    """
    kind = PARAMETERS.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, PARAMETERS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(PARAMETERS)}"
        raise ArgumentError(f"unknown parameter {name!r:.80}{hint}")
    if kind is list:
        return text
    if kind is bool:
        if text not in _TRUE | _FALSE:
            raise ArgumentError(f"parameter {name}: {text!r:.80} is neither true nor false")
        return text in _TRUE
    try:
        if "_" in text or text != text.strip():
            raise ValueError
        if kind is int:
            whole = int(text)
            if not -(2**63) <= whole < 2**63:
                raise ValueError
            return whole
        number = float(text)
        if not math.isfinite(number) or abs(number) > 3.4e38:
            raise ValueError
        return float32(number)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ArgumentError(f"parameter {name}: {text!r:.80} is no {what}") from None
