"""Which GELU a model without a gate computes, in config.json and in GGUF files.

llama.cpp approximates GELU by tanh in all these architectures. A checkpoint trained with the exact one gets a
key that says so, ``<arch>.hidden_activation``: azquant honours it, llama.cpp stays within 5e-4 of each
activation. Files without the key run as llama.cpp runs them.
"""

from __future__ import annotations

from azquant.architectures.fields import Fields
from azquant.gguf import MetadataValue, keys

__all__ = ["gelu_metadata", "gguf_gelu", "hf_gelu"]

KEY = "hidden_activation"
_EXACT = ("gelu", "gelu_python")
# transformers' names of one function: 0.5·x·(1 + tanh(sqrt(2/pi)·(x + 0.044715·x³))).
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")


def hf_gelu(fields: Fields, key: str, default: str) -> str:
    """The op's name, ``"gelu_erf"`` or ``"gelu_tanh"``. Raises ConversionError for other activations."""
    name = fields.text(key, default=default)
    if name in _EXACT:
        return "gelu_erf"
    if name not in _TANH:
        fields.fail(f"{key} is {name!r}, but GGUF's graph of this architecture computes GELU only")
    return "gelu_tanh"


def gguf_gelu(fields: Fields) -> str:
    """The op's name by the key. Raises ModelError for a value that is none of these."""
    return {"gelu": "gelu_erf", "gelu_pytorch_tanh": "gelu_tanh"}.get(
        fields.text(KEY, default="gelu_pytorch_tanh")
    ) or fields.fail(f"{fields.prefix}{KEY} is {fields.text(KEY)!r}; known are gelu and gelu_pytorch_tanh")


def gelu_metadata(activation: str) -> dict[str, MetadataValue]:
    """The key, where the exact GELU is meant."""
    return {KEY: keys.string("gelu")} if activation == "gelu_erf" else {}
