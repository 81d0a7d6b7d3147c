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
from azquant.errors import AzquantError, AzquantWarning

if TYPE_CHECKING:
    from azquant import store as store
    from azquant.conversion import convert, quantize_file
    from azquant.cpu import active_isa, backend, isas, num_threads, set_num_threads, use_isa
    from azquant.engine import load
    from azquant.gguf import open_gguf
    from azquant.ops import dequantize, matmul, quantize
    from azquant.tensor import QTensor

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

# Loaded on first use, so that `import azquant` stays quick: even NumPy, which a command may have better to do
# than to wait for.
_LAZY = {
    "QTensor": "azquant.tensor",
    "active_isa": "azquant.cpu",
    "backend": "azquant.cpu",
    "convert": "azquant.conversion",
    "dequantize": "azquant.ops",
    "isas": "azquant.cpu",
    "load": "azquant.engine",
    "matmul": "azquant.ops",
    "num_threads": "azquant.cpu",
    "open_gguf": "azquant.gguf",
    "quantize": "azquant.ops",
    "quantize_file": "azquant.conversion",
    "set_num_threads": "azquant.cpu",
    "use_isa": "azquant.cpu",
}
_LAZY_MODULES = ("cpu", "ops", "store", "tensor", "types")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"azquant.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'azquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
