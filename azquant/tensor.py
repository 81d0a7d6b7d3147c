"""QTensor: a tensor in one of ggml's types, its bytes as a GGUF file holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._backend import kernels
from azquant._pages import drop_pages
from azquant.cpu import _prepare
from azquant.errors import DTypeError, ShapeError, UnsupportedTypeError
from azquant.types import GGMLType, get_type

__all__ = ["QTensor", "pack_all"]


class QTensor:
    """A tensor of shape ``(..., K)`` stored as rows of blocks.

    ``data`` is a uint8 array of exactly the bytes that GGUF stores (read-only where it views a file). It is
    not copied, unless it begins at an odd address or is not contiguous. Shapes are NumPy's: outermost first,
    K last.

    Raises ShapeError when the bytes do not fit the shape, UnsupportedTypeError for an unknown type.
    """

    def __init__(
        self, data: npt.NDArray[np.uint8], shape: tuple[int, ...], type: str | GGMLType = "q4_0"
    ) -> None:
        self.type = get_type(type)
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 0:
            raise ShapeError(f"a QTensor needs at least one dimension and no negative one, not {shape}")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            raise DTypeError("a QTensor's data must be a uint8 array")
        needed = math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])
        if data.nbytes != needed:
            raise ShapeError(f"shape {self.shape} in {self.type} takes {needed} bytes, not {data.nbytes}")
        self.data = np.ascontiguousarray(data).reshape(-1)
        if self.data.ctypes.data % 2:  # kernels read the scales as 16-bit numbers
            self.data = self.data.copy()

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the GGUF form."""
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"QTensor({'x'.join(map(str, self.shape))}, {self.type}, {self.nbytes} bytes)"

    @cached_property
    def matrix(self) -> Any:
        """The backend's matrix over these bytes; two dimensions only."""
        if self.ndim != 2:
            raise ShapeError(f"a matrix has two dimensions, this tensor has shape {self.shape}")
        if not self.type.can_dequantize:
            raise UnsupportedTypeError(f"{self.type} weights cannot be computed with yet")
        _prepare()
        return kernels().Matrix(self.type.id, self.data, *self.shape)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as float32, of the tensor's shape.

        Raises UnsupportedTypeError where there is no decoder.
        """
        if not self.type.can_dequantize:
            raise UnsupportedTypeError(f"{self.type} tensors cannot be dequantized yet")
        _prepare()
        rows, k = math.prod(self.shape[:-1]), self.shape[-1]
        values: npt.NDArray[np.float32] = kernels().dequantize(self.type.id, self.data, rows, k)
        return values.reshape(self.shape)

    def pack(self) -> QTensor:
        """Makes the packed copy that the int8 and bf16 kernels read, now rather than at the first product.

        It is made by all threads straight from ``data``. Where that is a view of a file mapped for reading,
        the pages read are given back: the process keeps one copy of the weights, not two. ``data`` stays
        usable.

        Returns self.
        """
        if not self.matrix.packed_bytes():
            self.matrix.pack()
            if self.matrix.packed_bytes():
                drop_pages(self.data)
        return self

    def unpack(self) -> npt.NDArray[np.uint8]:
        """The GGUF bytes, made back from the packed copy: equal to ``data``."""
        data: npt.NDArray[np.uint8] = self.pack().matrix.unpack()
        return data

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed copy, 0 before there is one."""
        return int(self.__dict__["matrix"].packed_bytes()) if "matrix" in self.__dict__ else 0


def pack_all(tensors: Sequence[QTensor]) -> None:
    """:meth:`QTensor.pack` of each in one go, for which no other Python thread is waited for."""
    unpacked = [tensor for tensor in tensors if not tensor.matrix.packed_bytes()]
    kernels().pack_all([tensor.matrix for tensor in unpacked])
    for tensor in unpacked:
        if tensor.matrix.packed_bytes():
            drop_pages(tensor.data)
