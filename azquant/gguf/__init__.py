"""GGUF files: reading without copies, writing without accidents.

>>> from azquant.gguf import TensorSpec, keys, open_gguf, write_gguf
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from azquant.gguf import keys
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from azquant.gguf.totals import type_totals
from azquant.gguf.values import GGUFArray, Value, ValueType

if TYPE_CHECKING:
    from azquant.gguf.atomic import check_output
    from azquant.gguf.edit import edit_gguf, edited_metadata
    from azquant.gguf.fill import Piece
    from azquant.gguf.split import merge_gguf, split_gguf, write_split_gguf
    from azquant.gguf.writer import TensorSpec, write_gguf

__all__ = [
    "GGUFArray",
    "GGUFFile",
    "GGUFTensor",
    "MetadataValue",
    "Piece",
    "TensorSpec",
    "Value",
    "ValueType",
    "check_output",
    "edit_gguf",
    "edited_metadata",
    "keys",
    "merge_gguf",
    "open_gguf",
    "split_gguf",
    "type_totals",
    "write_gguf",
    "write_split_gguf",
]

# What writes files is loaded on first use: running a model needs none of it.
_LAZY = {
    "Piece": "fill",
    "TensorSpec": "writer",
    "check_output": "atomic",
    "edit_gguf": "edit",
    "edited_metadata": "edit",
    "merge_gguf": "split",
    "split_gguf": "split",
    "write_gguf": "writer",
    "write_split_gguf": "split",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'azquant.gguf' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"azquant.gguf.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
