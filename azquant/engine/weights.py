"""A GGUF file's tensors as programs take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._backend import kernels
from azquant.architectures import Architecture
from azquant.cpu import num_threads
from azquant.errors import ModelError
from azquant.gguf import GGUFFile
from azquant.tensor import QTensor, pack_all

__all__ = ["FileWeights"]

_TOGETHER = 12 << 20
"""Bytes of tensors that are packed in one go."""


class FileWeights:
    """Matrices over the mapped file (no copy), vectors as float32. A matrix asked for twice is one object."""

    def __init__(self, file: GGUFFile) -> None:
        self._tensors = file.tensors
        self._path = file.path
        self._matrices: dict[str, tuple[QTensor, ...]] = {}

    def _tensor(self, name: str, dimensions: int) -> QTensor:
        found = self._tensors.get(name)
        if found is None:
            raise ModelError(f"{self._path}: tensor {name} is missing")
        if len(found.shape) != dimensions:
            raise ModelError(
                f"{self._path}: tensor {name} has {len(found.shape)} dimensions, not {dimensions}"
            )
        if not found.type.can_dequantize:
            raise ModelError(f"{self._path}: tensor {name} is {found.type}, which azquant cannot run yet")
        return QTensor(found.data, found.shape, found.type)

    def matrix(self, name: str) -> Any:
        """A two-dimensional tensor, as the backend's matrix. Raises ModelError when it is missing."""
        if name not in self._matrices:
            self._matrices[name] = (self._tensor(name, 2),)
        return self._matrices[name][0].matrix

    def experts(self, name: str) -> tuple[Any, ...]:
        """A three-dimensional tensor, as a matrix for each expert. Raises ModelError when it is missing."""
        if name not in self._matrices:
            stacked = self._tensor(name, 3)
            each = stacked.data.reshape(stacked.shape[0], -1)
            self._matrices[name] = tuple(QTensor(data, stacked.shape[1:], stacked.type) for data in each)
        return tuple(tensor.matrix for tensor in self._matrices[name])

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A one-dimensional tensor as float32. Raises ModelError when it is missing."""
        return self._tensor(name, 1).dequantize()

    def optional_vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """The same, or ``None`` when it is missing."""
        return self.vector(name) if name in self._tensors else None

    def head(self) -> Any:
        """The output head's matrix: the token embedding's own where there is no other."""
        return self.matrix(
            Architecture.HEAD if Architecture.HEAD in self._tensors else Architecture.EMBEDDING
        )

    def _all(self) -> Iterator[QTensor]:
        return chain.from_iterable(self._matrices.values())

    def names(self) -> dict[int, str]:
        """The tensor's name for each matrix that was asked for, by the ``id`` of the backend's object."""
        return {id(tensor.matrix): name for name, held in self._matrices.items() for tensor in held}

    def running_bytes(self, packed: Sequence[Any]) -> int:
        """Bytes that all matrices take, these packed and the others read in place."""
        chosen = {id(matrix): matrix for matrix in packed}
        others = [t for t in self._all() if id(t.matrix) not in chosen]
        sizes: list[int] = [matrix.pack_bytes or matrix.data_bytes for matrix in chosen.values()]
        return sum(sizes) + sum(tensor.nbytes for tensor in others)

    def pack(self, chosen: Sequence[Any], beside: Callable[[], None] | None = None) -> None:
        """Packs these matrices. ``beside`` is called meanwhile: packing needs none of Python."""
        wanted = set(map(id, chosen))
        tensors = [tensor for tensor in self._all() if id(tensor.matrix) in wanted]
        failures: list[BaseException] = []
        alone = threading.Event()

        def run() -> None:
            try:
                for group in _groups(tensors):
                    # Whoever works beside this keeps a processor busy.
                    kernels().threads_here(0 if alone.is_set() else max(1, num_threads() - 1))
                    pack_all(group)
            except BaseException as error:
                failures.append(error)

        if beside is None:
            for group in _groups(tensors):
                pack_all(group)
            return
        thread = threading.Thread(target=run, name="azquant-pack")
        thread.start()
        try:
            beside()
        finally:
            alone.set()
            thread.join()
        if failures:
            raise failures[0]


def _groups(tensors: Sequence[QTensor]) -> Iterator[list[QTensor]]:
    """Some at a time: each group waits once for the interpreter, and is held twice while it is packed."""
    group: list[QTensor] = []
    for tensor in tensors:
        group.append(tensor)
        if sum(member.nbytes for member in group) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group
