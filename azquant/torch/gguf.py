"""transformers models filled from GGUF files and written to them, without quantizing anything twice.

Bytes are moved row by row, never decoded: the tensor rules of :mod:`azquant.architectures` say where to.
"""

from __future__ import annotations

import dataclasses
import math
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from azquant.architectures import Architecture
from azquant.architectures.base import Constant, Shift, Transpose
from azquant.errors import ArgumentError, ModelError, UnsupportedTypeError
from azquant.gguf import GGUFFile, GGUFTensor, keys, open_gguf
from azquant.tensor import QTensor
from azquant.torch.bindings import Binding, bindings, model_config, row_order
from azquant.torch.embedding import QuantEmbedding
from azquant.torch.linear import QuantLinear, is_conv1d
from azquant.torch.packed import PackedModule
from azquant.torch.quantize import replace_modules

__all__ = ["load_gguf"]


# ---- loading -----------------------------------------------------------------------------------------


def load_gguf(module: nn.Module, path: str | PathLike[str], *, compute: str = "auto") -> None:
    """Fills a transformers model (GPT-2, Llama and their like) with the tensors of a GGUF file, in place.

    Matrices that the file holds in another type than f32 become QuantLinear and QuantEmbedding on the same
    bytes; the rest is copied into the model's own parameters. A file without a head ties it to the embedding.

    Nothing is changed unless everything fits. Raises InputFileError, GGUFError, ModelError (another
    architecture, other hyperparameters, shapes or tensors than the model's), UnsupportedTypeError (a type
    that azquant cannot compute with), ConversionError (a config that GGUF expresses in changed weights).
    """
    _, architecture, config = model_config(module)
    with open_gguf(path) as file:
        _check_file(file, architecture, config)
        architecture.check_tensors(config, file.tensors)
        bound = bindings(module, architecture, config)
        made: dict[str, PackedModule] = {}
        values: list[tuple[Binding, torch.Tensor]] = []
        for name, binding in bound.items():
            tensor = file.tensors.get(name)
            if tensor is None:
                continue  # an optional one; the head follows below
            if not tensor.type.can_dequantize:
                raise UnsupportedTypeError(
                    f"{path}: tensor {name} is {tensor.type}, which azquant cannot compute with"
                )
            if _stays_dense(binding, tensor):
                values.append((binding, _dense_value(binding, tensor)))
            else:
                made[binding.owner] = _packed_module(binding, tensor, compute)
        unplaced = [name for name in file.tensors if name not in bound and name != Architecture.HEAD]
        constants = {r.name for r in architecture.rules(config) if isinstance(r.transform, Constant)}
        if set(unplaced) - constants:
            raise ModelError(f"{path}: {unplaced[0]} has no place in {module.__class__.__name__}")
        head = bound.get(Architecture.HEAD)
        tie_dense = False
        if head is not None and Architecture.HEAD not in file.tensors:
            embedding = made.get(bound[Architecture.EMBEDDING].owner)
            tie_dense = embedding is None
            if embedding is not None:
                rows, columns = embedding._shape
                tied = QuantLinear(columns, rows, False, embedding.quant_type, compute=compute)
                tied.tie(embedding)
                made[head.owner] = tied.train(head.module.training)
        elif head is not None and head.owner not in made:
            _untie(head, bound[Architecture.EMBEDDING])
        for binding, value in values:
            getattr(binding.module, binding.attribute).data.copy_(value)
        replace_modules(module, made)
        if tie_dense and head is not None:
            head.module.weight = bound[Architecture.EMBEDDING].module.weight


def _check_file(file: GGUFFile, architecture: Architecture[Any], config: Any) -> None:
    """That the file's hyperparameters are the model's."""
    name = file.metadata.get(keys.ARCHITECTURE)
    if name != architecture.name:
        raise ModelError(
            f"{file.path}: the file holds a {name!s:.40} model, but the module is a {architecture.name}"
        )
    stored = architecture.config.from_gguf(file.metadata)
    for field in dataclasses.fields(config):
        mine, other = getattr(config, field.name), getattr(stored, field.name)
        if field.name == "rope":
            mine, other = (mine.base, mine.scale), (other.base, other.scale)
            same = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(mine, other, strict=True))
        elif isinstance(mine, bool) or mine is None or other is None or other == field.default:
            continue  # the tensors tell, or a checkpoint alone
        elif field.name == "context_length":
            continue  # the position table's shape tells
        elif isinstance(mine, float):
            same = math.isclose(mine, other, rel_tol=1e-6)
        else:
            same = mine == other
        if not same:
            raise ModelError(f"{file.path}: {field.name} is {other}, but the module's config says {mine}")


def _stays_dense(binding: Binding, tensor: GGUFTensor) -> bool:
    if binding.attribute != "weight" or len(binding.rule.shape) != 2:
        return True
    return tensor.type.name == "f32" and not isinstance(binding.module, PackedModule)


def _dense_value(binding: Binding, tensor: GGUFTensor) -> torch.Tensor:
    """What a parameter will hold."""
    parameter = getattr(binding.module, binding.attribute)
    if parameter.device.type != "cpu":
        raise ArgumentError(
            f"{binding.owner}.{binding.attribute} is on {parameter.device}: "
            "the model must be on the CPU, with data"
        )
    values = QTensor(tensor.data, tensor.shape, tensor.type).dequantize()
    transform = binding.rule.transform
    if isinstance(transform, Shift):
        values = values - np.float32(transform.amount)
    else:
        order = row_order(binding.rule)
        if order is not None:
            moved = np.empty_like(values)
            moved[order] = values
            values = moved
        if isinstance(transform, Transpose):
            values = values.T
    return torch.from_numpy(np.ascontiguousarray(values))


def _packed_module(binding: Binding, tensor: GGUFTensor, compute: str) -> PackedModule:
    """The layer on the tensor's bytes, in the model's order of rows."""
    rows = tensor.data.reshape(tensor.shape[0], -1)
    order = row_order(binding.rule)
    if order is not None:
        moved = np.empty_like(rows)
        moved[order] = rows
        rows = moved
    q = QTensor(np.ascontiguousarray(rows).reshape(-1), tensor.shape, tensor.type)
    old = binding.module
    made: PackedModule
    if old.__class__ in (nn.Embedding, QuantEmbedding):
        assert isinstance(old, (nn.Embedding, QuantEmbedding))
        dtype = old.weight.dtype if isinstance(old, nn.Embedding) else old.like.dtype
        made = QuantEmbedding.from_qtensor(q, padding_idx=old.padding_idx, dtype=dtype)
    elif old.__class__ in (nn.Linear, QuantLinear) or is_conv1d(old):
        bias = getattr(old, "bias", None)
        made = QuantLinear.from_qtensor(q, bias if isinstance(bias, torch.Tensor) else None, compute=compute)
    else:
        raise ModelError(
            f"{binding.owner} is a {old.__class__.__name__}, which cannot hold a {tensor.type} matrix"
        )
    return made.train(old.training)


def _untie(head: Binding, embedding: Binding) -> None:
    """A dense head that the file holds apart must not be written into the embedding."""
    if head.module.weight is embedding.module.weight:
        shared = head.module.weight
        assert isinstance(shared, torch.Tensor)
        head.module.weight = nn.Parameter(shared.detach().clone())
