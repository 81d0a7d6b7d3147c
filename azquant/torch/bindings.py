"""Which module of a transformers model holds which GGUF tensor, and in which order of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from azquant.architectures import Architecture, TensorRule, architecture_of_config
from azquant.architectures.base import Constant, Keep, RopeInterleave, Transpose, UngroupQKV
from azquant.errors import ArgumentError, ConversionError, ModelError

__all__ = ["Binding", "bindings", "model_config", "row_order"]

# Those whose modules hold what their checkpoints' tensors are called after, and compute nothing beside it.
_KNOWN = ("gpt2", "llama", "qwen2", "qwen3", "phi3", "starcoder2", "olmo2", "granite")


@dataclass(frozen=True)
class Binding:
    """One GGUF tensor and the module that holds it."""

    rule: TensorRule
    owner: str
    """The module's name."""
    module: nn.Module
    attribute: str
    """``"weight"`` or ``"bias"``."""


def model_config(module: nn.Module) -> tuple[dict[str, Any], Architecture[Any], Any]:
    """config.json's content, the architecture and its checked config of a transformers model.

    Raises ArgumentError for another kind of module, ConversionError for a model that azquant does not know.
    """
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if to_dict is None:
        raise ArgumentError(
            f"a transformers model is needed, one with a config; {module.__class__.__name__} has none"
        )
    values: dict[str, Any] = to_dict()
    architecture = architecture_of_config(values)
    if architecture.name not in _KNOWN:
        raise ConversionError(
            f"{architecture.name} models cannot be filled from GGUF files or written to them here, only "
            f"{', '.join(_KNOWN)}; convert the checkpoint instead"
        )
    config = architecture.config.from_hf(values)
    if getattr(config, "experts", None) is not None:
        raise ConversionError(
            "mixtures of experts cannot be filled from GGUF files or written to them here; "
            "convert the checkpoint instead"
        )
    return values, architecture, config


def bindings(module: nn.Module, architecture: Architecture[Any], config: Any) -> dict[str, Binding]:
    """Each GGUF tensor that the model has a place for, by GGUF name, in file order.

    Raises ModelError when a tensor that the architecture needs has none.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    found = {}
    for rule in architecture.rules(config):
        if isinstance(rule.transform, Constant):
            continue
        path, _, attribute = rule.source.rpartition(".")
        owner = next(
            (prefix + path for prefix in (*architecture.prefixes, "") if prefix + path in modules), None
        )
        if owner is None or not isinstance(getattr(modules[owner], attribute, None), torch.Tensor):
            if rule.optional:
                continue
            raise ModelError(f"{module.__class__.__name__} has no {rule.source}, where GGUF has {rule.name}")
        found[rule.name] = Binding(rule, owner, modules[owner], attribute)
    return found


class _RowNumbers:
    """A tensor whose every row holds its own number, to see where a transform puts it."""

    def __init__(self, rows: int) -> None:
        self.shape = (rows, 1)

    def read_f32(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        rows = np.arange(start, self.shape[0] if stop is None else stop, dtype=np.float32)  # exact below 2^24
        return rows[:, None]


def row_order(rule: TensorRule) -> NDArray[np.int64] | None:
    """For each row of the GGUF tensor, the row of the model's (out, in) matrix; None when they are the same.

    Raises ConversionError for a rule that changes values, which quantized bytes cannot follow.
    """
    transform = rule.transform
    if isinstance(transform, (Keep, Transpose)):
        return None
    if not isinstance(transform, (RopeInterleave, UngroupQKV)) or rule.shape[0] >= 1 << 24:
        raise ConversionError(
            f"{rule.name} is {rule.source} with its values changed ({transform.__class__.__name__}): "
            "convert the checkpoint instead"
        )
    bands = transform.bands(_RowNumbers(rule.shape[0]), rule.shape[0])
    return np.concatenate(list(bands))[:, 0].astype(np.int64)
