"""GGUF files: reading without copies, writing without accidents.

>>> from azquant.gguf import TensorSpec, keys, open_gguf, write_gguf
"""

from azquant.gguf import keys
from azquant.gguf.atomic import check_output
from azquant.gguf.edit import edit_gguf, edited_metadata
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.fill import Piece
from azquant.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from azquant.gguf.split import merge_gguf, split_gguf, write_split_gguf
from azquant.gguf.totals import type_totals
from azquant.gguf.values import GGUFArray, Value, ValueType
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
