"""The model architectures azquant knows, one small file each, with both sides: conversion and inference.

Names of tensors and keys are those that llama.cpp's converter writes, and the tensors' bytes too (the tests
compare them). Where azquant differs, it does so on purpose:

- ``<arch>.vocab_size``: always written, so that a file without a tokenizer can be run.
- Head sizes, RoPE base, dimensions and scaling: always written. The other converter leaves some out where
  they are the graph's default, and forgets some (gptneox, falcon, gemma2, phi3).
- ``attention.sliding_window``: also for mistral, qwen2, qwen3 and starcoder2, where azquant honours it;
  ``attention.sliding_window_pattern`` where ``layer_types`` departs from the family's rule.
- ``hidden_activation``: "gelu" where the exact one is meant (see ``gelu.py``).
- Context and feed-forward length of falcon: those of the config, not constants.
- Score scales of gpt2, gemma2 and gemma3: folded into the queries where the graph has no other place.
- Zero biases for gptneox and starcoder2 without biases, and ``output.weight`` as a copy of the embedding for
  tied gptneox and olmo2: llama.cpp would not load the file otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from azquant.architectures.base import Architecture, TensorRule
from azquant.architectures.falcon import FALCON
from azquant.architectures.gemma import GEMMA2, GEMMA3
from azquant.architectures.gpt2 import GPT2, GPT2Config
from azquant.architectures.gptneox import GPTNEOX
from azquant.architectures.granite import GRANITE
from azquant.architectures.llama import LLAMA, LlamaConfig
from azquant.architectures.olmo2 import OLMO2
from azquant.architectures.phi3 import PHI3
from azquant.architectures.qwen import QWEN2, QWEN3
from azquant.architectures.starcoder2 import STARCODER2
from azquant.errors import ConversionError, ModelError, UnsupportedArchitectureError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GPT2Config",
    "LlamaConfig",
    "TensorRule",
    "architecture_of_config",
    "architecture_of_gguf",
]

_ALL: tuple[Architecture[Any], ...] = (
    GPT2,
    LLAMA,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    GPTNEOX,
    STARCODER2,
    OLMO2,
    GRANITE,
    FALCON,
)
ARCHITECTURES: dict[str, Architecture[Any]] = {item.name: item for item in _ALL}
"""Every known architecture by its ``general.architecture`` name."""

_BY_HF_NAME = {name: item for item in ARCHITECTURES.values() for name in item.hf_names}
_BY_TYPE = {name: item for item in ARCHITECTURES.values() for name in (item.name, *item.model_types)}


def architecture_of_config(config: Mapping[str, Any]) -> Architecture[Any]:
    """The architecture that a Hugging Face ``config.json`` names.

    ``architectures`` decides; ``model_type`` where it is absent or empty (hand-written configs).
    Raises UnsupportedArchitectureError naming what was found and what is known, ConversionError if neither is
    there.
    """
    listed = config.get("architectures")
    if listed:
        names = listed if isinstance(listed, list) else [listed]
        for name in names:
            if isinstance(name, str) and name in _BY_HF_NAME:
                return _BY_HF_NAME[name]
        found = ", ".join(map(str, names))
    else:
        model_type = config.get("model_type")
        if not model_type:
            raise ConversionError(
                "config.json: neither architectures nor model_type says what model this is; "
                f"known are {', '.join(_BY_HF_NAME)}"
            )
        if isinstance(model_type, str) and model_type in _BY_TYPE:
            return _BY_TYPE[model_type]
        found = str(model_type)
    raise UnsupportedArchitectureError(
        f"config.json: architecture {found:.80} is not supported; known are {', '.join(_BY_HF_NAME)}"
    )


def architecture_of_gguf(metadata: Mapping[str, Any]) -> Architecture[Any]:
    """The architecture that a GGUF file's metadata names. Raises ModelError for a missing or unknown one."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError("GGUF metadata: general.architecture is missing, so this is no model")
    found = ARCHITECTURES.get(name)
    if found is None:
        raise ModelError(
            f"GGUF metadata: architecture {name[:80]!r} is not supported; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    return found
