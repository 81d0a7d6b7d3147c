"""The matrices of a layer's experts, which checkpoints keep apart and GGUF stacks in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from azquant.checkpoint import LazyTensor
from azquant.conversion.lora import MergedTensor

__all__ = ["StackedSource"]


class StackedSource:
    """Matrices of one shape, one below the other; each may be merged with an adapter."""

    def __init__(self, name: str, parts: Sequence[LazyTensor | MergedTensor]) -> None:
        self.name, self.parts = name, tuple(parts)
        rows, columns = parts[0].shape
        self.shape = (rows * len(parts), columns)
        self.dtype = parts[0].dtype
        self.nbytes = sum(part.nbytes for part in parts)

    @property
    def file(self) -> Path:
        """The file of the first; there may be others."""
        return self.parts[0].file

    def read_f32(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``[start:stop]`` as float32. Errors are those of :meth:`LazyTensor.read_f32`."""
        stop = self.shape[0] if stop is None else stop
        rows = self.parts[0].shape[0]
        pieces = []
        while start < stop:
            part, first = divmod(start, rows)
            last = min(rows, first + stop - start)
            pieces.append(self.parts[part].read_f32(first, last))
            start += last - first
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
