"""The model architectures azquant knows, one small file each, with both sides: conversion and inference.

Names of tensors and keys are those that llama.cpp's converter writes, and the tensors' bytes too (the tests
compare them). Where azquant differs, it does so on purpose:

- ``<arch>.vocab_size``: always written, so that a file without a tokenizer can be run.
- Head sizes, RoPE base, dimensions and scaling: always written. The other converter leaves some out where
  they are the graph's default, and forgets some (gptneox, falcon, gemma2, phi3).
- ``attention.sliding_window``: also for mistral, mixtral, qwen2, qwen3, qwen3moe and starcoder2, where
  azquant honours it; ``attention.sliding_window_pattern`` where ``layer_types`` departs from the family's
  rule.
- ``hidden_activation``: "gelu" where the exact one is meant (see ``gelu.py``).
- Context and feed-forward length of falcon: those of the config, not constants.
- Score scales of gpt2, gemma2 and gemma3: folded into the queries where the graph has no other place.
- Zero biases for gptneox and starcoder2 without biases, and ``output.weight`` as a copy of the embedding for
  tied gptneox and olmo2: llama.cpp would not load the file otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from azquant.architectures.base import Architecture, TensorRule
from azquant.errors import ConversionError, ModelError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from azquant.architectures.gpt2 import GPT2Config
    from azquant.architectures.llama import LlamaConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GPT2Config",
    "LlamaConfig",
    "TensorRule",
    "architecture_of_config",
    "architecture_of_gguf",
]

# Each file is loaded when one of its architectures is asked for: running a model takes one of them.
_MODULES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3moe": "qwen",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "phi3": "phi3",
    "gptneox": "gptneox",
    "starcoder2": "starcoder2",
    "olmo2": "olmo2",
    "granite": "granite",
    "falcon": "falcon",
}


class _Registry(Mapping[str, "Architecture[Any]"]):
    def __getitem__(self, name: str) -> Architecture[Any]:
        module = importlib.import_module(f"azquant.architectures.{_MODULES[name]}")
        found: Architecture[Any] = getattr(module, name.upper())
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


ARCHITECTURES: Mapping[str, Architecture[Any]] = _Registry()
"""Every known architecture by its ``general.architecture`` name."""


def __getattr__(name: str) -> Any:
    if name not in ("GPT2Config", "LlamaConfig"):
        raise AttributeError(f"module 'azquant.architectures' has no attribute {name!r}")
    return getattr(
        importlib.import_module(f"azquant.architectures.{name.removesuffix('Config').lower()}"), name
    )


def _hf_names(item: Architecture[Any]) -> tuple[str, ...]:
    return tuple(item.hf_names)


def _types(item: Architecture[Any]) -> tuple[str, ...]:
    return item.name, *item.model_types


def _known(names: Callable[[Architecture[Any]], tuple[str, ...]]) -> str:
    return ", ".join(name for item in ARCHITECTURES.values() for name in names(item))


def _named(name: str, names: Callable[[Architecture[Any]], tuple[str, ...]]) -> Architecture[Any] | None:
    """The architecture that goes by ``name``. Only one is imported where it begins like its GGUF name."""
    by_likeness = sorted(ARCHITECTURES, key=lambda known: not name.lower().startswith(known))
    return next((ARCHITECTURES[known] for known in by_likeness if name in names(ARCHITECTURES[known])), None)


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
            if isinstance(name, str) and (item := _named(name, _hf_names)):
                return item
        found = ", ".join(map(str, names))
    else:
        model_type = config.get("model_type")
        if not model_type:
            raise ConversionError(
                "config.json: neither architectures nor model_type says what model this is; "
                f"known are {_known(_hf_names)}"
            )
        if isinstance(model_type, str) and (item := _named(model_type, _types)):
            return item
        found = str(model_type)
    raise UnsupportedArchitectureError(
        f"config.json: architecture {found:.80} is not supported; known are {_known(_hf_names)}"
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
