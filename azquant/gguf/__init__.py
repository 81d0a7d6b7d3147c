"""GGUF files: reading without copies, writing without accidents.

>>> from azquant.gguf import TensorSpec, keys, open_gguf, write_gguf
"""

from azquant.gguf import keys
from azquant.gguf.atomic import check_output
from azquant.gguf.encoding import MetadataValue
from azquant.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from azquant.gguf.values import GGUFArray, Value, ValueType
from azquant.gguf.writer import TensorSpec, write_gguf

__all__ = [
    "GGUFArray",
    "GGUFFile",
    "GGUFTensor",
    "MetadataValue",
    "TensorSpec",
    "Value",
    "ValueType",
    "check_output",
    "keys",
    "open_gguf",
    "write_gguf",
]
