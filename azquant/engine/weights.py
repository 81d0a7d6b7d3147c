"""A GGUF file's tensors as programs take them."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from azquant._backend import kernels
from azquant.architectures import Architecture
from azquant.cpu import _prepare, num_threads
from azquant.errors import ModelError
from azquant.gguf import GGUFFile, GGUFTensor

if TYPE_CHECKING:
    from azquant.program import Floats
    from azquant.types import GGMLType

__all__ = ["FileWeights"]

_TOGETHER = 12 << 20
"""Bytes of tensors that are packed in one go."""


class _Tensor:
    """A matrix of the file, or of a stack of them: a QTensor over bytes that stay where they are."""

    def __init__(self, found: GGUFTensor, part: int | None = None) -> None:
        self._found = found
        self._start, self._stop = 0, found.nbytes
        if part is not None:
            size = found.nbytes // found.shape[0]
            self._start, self._stop = part * size, (part + 1) * size

    @property
    def type(self) -> GGMLType:
        """Its type."""
        return self._found.type

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._stop - self._start

    @cached_property
    def matrix(self) -> Any:
        """The backend's matrix over the file's bytes."""
        _prepare()
        rows, columns = self._found.shape[-2:]
        return kernels().Matrix(self.type.id, self._data(), rows, columns)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed copy, 0 before there is one."""
        return int(self.matrix.packed_bytes())

    def release(self) -> None:
        """The file's bytes will not be read again soon."""
        self._found.release(self._start, self._stop)

    def _data(self) -> Any:
        """The bytes as the backend takes them: scales are read as numbers of 16 bits."""
        aligned = (self._found.offset + self._start) % 2 == 0
        if kernels().NAME == "numpy":
            data = self._found.data[self._start : self._stop]
            return data if aligned else data.copy()
        part = self._found.buffer[self._start : self._stop]
        return part if aligned else memoryview(bytes(part))


class FileWeights:
    """Matrices over the mapped file (no copy), vectors as float32. A matrix asked for twice is one object."""

    def __init__(self, file: GGUFFile) -> None:
        self._tensors = file.tensors
        self._path = file.path
        self._matrices: dict[str, tuple[_Tensor, ...]] = {}

    def _tensor(self, name: str, dimensions: int) -> GGUFTensor:
        found = self._tensors.get(name)
        if found is None:
            raise ModelError(f"{self._path}: tensor {name} is missing")
        if len(found.shape) != dimensions:
            raise ModelError(
                f"{self._path}: tensor {name} has {len(found.shape)} dimensions, not {dimensions}"
            )
        if not found.type.can_dequantize:
            raise ModelError(f"{self._path}: tensor {name} is {found.type}, which azquant cannot run yet")
        return found

    def matrix(self, name: str) -> Any:
        """A two-dimensional tensor, as the backend's matrix. Raises ModelError when it is missing."""
        if name not in self._matrices:
            self._matrices[name] = (_Tensor(self._tensor(name, 2)),)
        return self._matrices[name][0].matrix

    def experts(self, name: str) -> tuple[Any, ...]:
        """A three-dimensional tensor, as a matrix for each expert. Raises ModelError when it is missing."""
        if name not in self._matrices:
            stacked = self._tensor(name, 3)
            self._matrices[name] = tuple(_Tensor(stacked, expert) for expert in range(stacked.shape[0]))
        return tuple(tensor.matrix for tensor in self._matrices[name])

    def vector(self, name: str) -> Floats:
        """A one-dimensional tensor as float32. Raises ModelError when it is missing."""
        found = self._tensor(name, 1)
        if found.type.name == "f32" and kernels().NAME != "numpy":
            return array("f", found.buffer.tobytes())
        _prepare()
        values: Floats = kernels().dequantize(found.type.id, found.data, 1, found.shape[0]).reshape(-1)
        return values

    def optional_vector(self, name: str) -> Floats | None:
        """The same, or ``None`` when it is missing."""
        return self.vector(name) if name in self._tensors else None

    def head(self) -> Any:
        """The output head's matrix: the token embedding's own where there is no other."""
        return self.matrix(
            Architecture.HEAD if Architecture.HEAD in self._tensors else Architecture.EMBEDDING
        )

    def _all(self) -> Iterator[_Tensor]:
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
                    _pack_all(group)
            except BaseException as error:
                failures.append(error)

        if beside is None:
            for group in _groups(tensors):
                _pack_all(group)
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


def _pack_all(tensors: Sequence[_Tensor]) -> None:
    """Packs each in one go, for which no other Python thread is waited for; gives back the pages read."""
    unpacked = [tensor for tensor in tensors if not tensor.packed_nbytes]
    kernels().pack_all([tensor.matrix for tensor in unpacked])
    for tensor in unpacked:
        if tensor.packed_nbytes:
            tensor.release()


def _groups(tensors: Sequence[_Tensor]) -> Iterator[list[_Tensor]]:
    """Some at a time: each group waits once for the interpreter, and is held twice while it is packed."""
    group: list[_Tensor] = []
    for tensor in tensors:
        group.append(tensor)
        if sum(member.nbytes for member in group) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group
