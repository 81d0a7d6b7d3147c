"""azquant: checkpoints to 4-bit GGUF files, and a CPU engine that runs them.

>>> import azquant as aq
>>> qt = aq.quantize(weights, "q4_0")           # (N, K) floats -> the bytes ggml's reference makes
>>> y = aq.matmul(x, qt)                        # (..., K) -> (..., N)
>>> aq.convert("my_model_hf", "my-model-q4_0.gguf", type="q4_0")
>>> aq.load("my-model-q4_0.gguf").generate("Azərbaycan", max_tokens=64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from azquant._version import __version__
from azquant.cpu import active_isa, backend, isas, num_threads, set_num_threads, use_isa
from azquant.errors import AzquantError, AzquantWarning
from azquant.ops import dequantize, matmul, quantize
from azquant.tensor import QTensor

if TYPE_CHECKING:
    from azquant import store as store
    from azquant.conversion import convert, quantize_file
    from azquant.engine import load
    from azquant.gguf import open_gguf

__all__ = [
    "AzquantError",
    "AzquantWarning",
    "QTensor",
    "__version__",
    "active_isa",
    "backend",
    "convert",
    "dequantize",
    "isas",
    "load",
    "matmul",
    "num_threads",
    "open_gguf",
    "quantize",
    "quantize_file",
    "set_num_threads",
    "use_isa",
]

# Loaded on first use, so that `import azquant` stays quick.
_LAZY = {
    "convert": "azquant.conversion",
    "load": "azquant.engine",
    "open_gguf": "azquant.gguf",
    "quantize_file": "azquant.conversion",
}


def __getattr__(name: str) -> Any:
    if name == "store":
        return importlib.import_module("azquant.store")
    if name not in _LAZY:
        raise AttributeError(f"module 'azquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
