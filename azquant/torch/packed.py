"""A module's quantized weight: packed in memory, GGUF's bytes everywhere else.

Memory holds one form, the one that the kernels read; it can be turned back into GGUF's bytes exactly.
``state_dict``, pickles and GGUF files hold those, since the packed layout belongs to a version of azquant
and a kind of processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from azquant._backend import kernels
from azquant.errors import ArgumentError, InternalError, ShapeError, UnsupportedTypeError
from azquant.tensor import QTensor
from azquant.torch.functional import embedding, prepare
from azquant.types import GGMLType, get_type

__all__ = ["PackedModule"]


class PackedModule(nn.Module):
    """Base of QuantLinear and QuantEmbedding: a weight (rows, columns) in the ggml type ``quant_type``."""

    packed: torch.Tensor

    def __init__(self, rows: int, columns: int, type: str | GGMLType) -> None:
        super().__init__()
        found = get_type(type)
        if not found.can_dequantize:
            raise UnsupportedTypeError(f"{found} weights cannot be computed with yet")
        if rows < 0 or columns < 0:
            raise ShapeError(f"a weight cannot have the shape ({rows}, {columns})")
        self.quant_type: str = found.name
        self._type_id: int = found.id
        self._shape = (rows, columns)
        self._row_bytes = found.row_bytes(columns)
        self._tied: tuple[PackedModule, ...] = ()
        prepare()
        nbytes = kernels().packed_bytes(found.id, rows, columns)
        self.register_buffer("packed", torch.zeros(nbytes, dtype=torch.uint8, device="cpu"), persistent=False)

    # ---- the weight ----

    @property
    def weight(self) -> torch.Tensor:
        """The bytes that GGUF stores: uint8 (rows, bytes of a row), made anew from the packed form."""
        rows, columns = self._shape
        data = kernels().unpack(self._type_id, self.packed.numpy(), rows, columns, torch.get_num_threads())
        return torch.from_numpy(data).reshape(rows, self._row_bytes)

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the weight takes in memory; 0 where it is another module's."""
        return 0 if self._tied else self.packed.nbytes

    @property
    def tied_to(self) -> PackedModule | None:
        """The module whose weight this one shares, as a tied head shares the embedding's."""
        return self._tied[0] if self._tied else None

    def to_qtensor(self) -> QTensor:
        """The weight as a QTensor."""
        return QTensor(self.weight.numpy().reshape(-1), self._shape, self.quant_type)

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 (rows, columns)."""
        rows, columns = self._shape
        return embedding(torch.arange(rows), self.packed, self._type_id, rows, columns, torch.float32)

    def set_bytes(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Replaces the weight by ``data``, GGUF's bytes, in place. Raises ShapeError when they do not fit."""
        rows, columns = self._shape
        if data.nbytes != rows * self._row_bytes:
            raise ShapeError(
                f"{rows} rows of {columns} in {self.quant_type} take {rows * self._row_bytes} bytes, "
                f"not {data.nbytes}"
            )
        flat = np.ascontiguousarray(data).reshape(-1)
        if flat.ctypes.data % 2:  # a view of a file; the packing reads whole scales
            flat = flat.copy()
        kernels().pack(self._type_id, flat, rows, columns, self.packed.numpy(), torch.get_num_threads())

    def tie(self, other: PackedModule) -> None:
        """Uses the weight of ``other`` from now on. Raises ShapeError unless shape and type are the same."""
        if (self._shape, self.quant_type) != (other._shape, other.quant_type):
            raise ShapeError(
                f"a weight {self._shape} in {self.quant_type} cannot share one "
                f"{other._shape} in {other.quant_type}"
            )
        other = other.tied_to or other
        self.packed = other.packed
        self._tied = (other,)

    # ---- state_dict ----

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._tied:
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._tied:
            return
        key = prefix + "weight"
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        data = state_dict.get(key)
        if data is None:
            missing_keys.append(key)
            return
        expected = (self._shape[0], self._row_bytes)
        if data.is_floating_point():
            error_msgs.append(
                f"{key} is a {data.dtype} tensor, but this layer is quantized: load it into the original "
                "model, then call quantize_"
            )
        elif data.dtype != torch.uint8 or tuple(data.shape) != expected:
            error_msgs.append(
                f"{key} is {data.dtype} {tuple(data.shape)}, but {self._shape} in {self.quant_type} is "
                f"torch.uint8 {expected}"
            )
        elif data.device.type == "meta":
            error_msgs.append(f"{key} is on the meta device: it has no data to load")
        else:
            self.set_bytes(data.detach().cpu().contiguous().numpy())

    # ---- copies ----

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedModule:
        # Here, so that copies do not take the way of pickles; tensors shared stay shared through memo.
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name != "packed"}
        state["_gguf_bytes"] = None if self._tied else self.weight
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        data = state.pop("_gguf_bytes")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._tied:
            packed = self._tied[0].packed
        else:
            prepare()
            packed = torch.zeros(kernels().packed_bytes(self._type_id, *self._shape), dtype=torch.uint8)
        self._buffers["packed"] = packed
        if not self._tied:
            if data is None:
                raise InternalError("a pickled layer has neither bytes nor another layer's")
            self.set_bytes(data.numpy())

    # ---- .to(...) ----

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=torch.uint8))
        if probe.device.type != "cpu":
            raise ArgumentError(
                f"azquant computes on the CPU; {self.__class__.__name__} cannot be moved to {probe.device}. "
                "For other devices use dequantize() or the original model"
            )
        if probe.dtype != torch.uint8:
            raise ArgumentError(
                f"the packed bytes of a {self.__class__.__name__} cannot become {probe.dtype}: "
                "use .to(dtype) or .half(), .bfloat16(), .float(), which leave them alone"
            )
        packed = self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.packed is not packed and self._tied:
            self.packed = self._tied[0].packed
        return self
