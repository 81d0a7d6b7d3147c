"""Several tensors of a checkpoint read as one: matrices that a model keeps apart and a file holds fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.checkpoint.tensor import LazyTensor
from azquant.errors import ArgumentError

__all__ = ["StackedTensor"]


class StackedTensor(LazyTensor):
    """``parts`` one below the other, along axis 0. Only the rows asked for are read.

    The parts agree in dtype and in every axis but the first (ArgumentError if not).
    """

    __slots__ = ("_parts",)

    def __init__(self, name: str, parts: Sequence[LazyTensor]) -> None:
        if not parts or any(not part.shape for part in parts):
            raise ArgumentError(f"{name}: nothing to stack")
        first = parts[0]
        for part in parts:
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise ArgumentError(
                    f"{part.name} is {part.dtype} {part.shape}, {first.name} is {first.dtype} {first.shape}: "
                    "they cannot be stacked"
                )
        rows = sum(part.shape[0] for part in parts)
        super().__init__(name, (rows, *first.shape[1:]), first.dtype, first._source, first._offset)
        self._parts = tuple(parts)

    @property
    def parts(self) -> tuple[LazyTensor, ...]:
        """The tensors it is made of, from the top."""
        return self._parts

    def _read(
        self,
        start: int,
        stop: int | None,
        result: np.dtype[Any],
        convert: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> NDArray[Any]:
        start, stop = self._rows(start, stop)
        out = np.empty((stop - start, *self.shape[1:]), result)
        first = 0
        for part in self._parts:
            low, high = max(start, first), min(stop, first + part.shape[0])
            if low < high:
                out[low - start : high - start] = part._read(low - first, high - first, result, convert)
            first += part.shape[0]
        return out
