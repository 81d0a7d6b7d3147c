"""One tensor of a checkpoint, read when asked for and no sooner.

Every format comes down to the same description: a byte offset in a file, an element type, a shape and element
strides. A safetensors tensor is always contiguous; a torch one may be any view of a storage.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.checkpoint.source import FileSource
from azquant.errors import ArgumentError, CheckpointError, OutOfMemoryError

__all__ = ["DTYPES", "MAX_DIMS", "LazyTensor", "element_count"]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
"""Element types by their safetensors name, with the NumPy type that holds their bits."""

MAX_DIMS = 32  # NumPy 1 allows no more

# Bytes read at a time where they have to be converted or gathered; the only memory beside the result.
_BAND = 1 << 22


def element_count(shape: tuple[int, ...], itemsize: int) -> int | None:
    """Elements in ``shape``, or None when it has too many dimensions or its size overflows 63 bits.

    Zeros are left out of the overflow check on purpose: (0, 2**62, 2**62) holds nothing, yet no array library
    can make it.
    """
    if len(shape) > MAX_DIMS or math.prod(n for n in shape if n) * itemsize >= 1 << 63:
        return None
    return math.prod(shape)


class LazyTensor:
    """A tensor in a checkpoint file; nothing of it is in memory until it is read.

    ``strides`` are in elements; None means C order. Whoever makes one has checked that every
    element lies in the file.
    """

    __slots__ = ("_big_endian", "_offset", "_source", "_strides", "dtype", "name", "shape")

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        source: FileSource,
        offset: int,
        *,
        strides: tuple[int, ...] | None = None,
        big_endian: bool = False,
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        """Safetensors name of the element type: ``"F32"``, ``"BF16"``, ``"I64"``, ..."""
        self._source = source
        self._offset = offset
        if strides is None or _is_contiguous(shape, strides):
            strides = None
        self._strides = strides
        self._big_endian = big_endian

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, shape={self.shape}, dtype={self.dtype!r})"

    @property
    def file(self) -> Path:
        """The file it lies in."""
        return self._source.path

    @property
    def nbytes(self) -> int:
        """Bytes of all elements in the stored element type."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read_f32(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``[start:stop]`` along axis 0 as a C-contiguous float32 array (a 0-dim tensor as a whole).

        Exact for every stored float type except F64, which is rounded to nearest (and to infinity beyond the
        range of float32). A contiguous tensor costs exactly the bytes of the rows asked for.

        Raises CheckpointError for integer and boolean tensors and when the file is cut short, ArgumentError
        for rows outside the tensor, OutOfMemoryError when the array cannot be made.
        """
        convert = _TO_F32.get(self.dtype)
        if convert is None:
            raise CheckpointError(
                f"tensor {self.name!r} holds {self.dtype}, not floating point numbers", path=self.file
            )
        return self._read(start, stop, np.dtype(np.float32), convert)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``[start:stop]`` in the stored type and the machine's byte order.

        BF16 comes as uint16 bit patterns, both F8 types as uint8, BOOL as bool. Errors as :meth:`read_f32`.
        """
        if self.dtype == "BOOL":  # any non-zero byte is true, and a bool array must hold only 0 and 1
            return self._read(start, stop, np.dtype(np.bool_), lambda raw: raw != 0)
        return self._read(start, stop, DTYPES[self.dtype].newbyteorder("="), lambda raw: raw)

    def _read(
        self,
        start: int,
        stop: int | None,
        result: np.dtype[Any],
        convert: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> NDArray[Any]:
        start, stop = self._rows(start, stop)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        try:
            out = np.empty(shape, result)
        except MemoryError as e:
            raise OutOfMemoryError(
                f"{self.file}: tensor {self.name!r} needs "
                f"{math.prod(shape) * result.itemsize} bytes of memory"
            ) from e
        if out.size:
            if self._strides is None:
                first = start * math.prod(self.shape[1:])
                self._fill_contiguous(out.reshape(-1), first, convert)
            else:
                self._fill_strided(out, start, self._strides, convert)
        return out

    def _rows(self, start: int, stop: int | None) -> tuple[int, int]:
        rows = self.shape[0] if self.shape else 1
        start = operator.index(start)
        stop = rows if stop is None else operator.index(stop)
        if not 0 <= start <= stop <= rows or (not self.shape and stop - start != 1):
            raise ArgumentError(f"rows {start}:{stop} of tensor {self.name!r}, which has {rows}")
        return start, stop

    @property
    def _stored(self) -> np.dtype[Any]:
        dtype = DTYPES[self.dtype]
        return dtype.newbyteorder(">") if self._big_endian else dtype

    def _fill_contiguous(
        self, out: NDArray[Any], first: int, convert: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        stored = self._stored
        offset = self._offset + first * stored.itemsize
        if out.dtype == stored:  # the bytes are the result: no copy
            self._source.read_into(offset, out.view(np.uint8).data)
            return
        step = _BAND // stored.itemsize
        for i in range(0, out.size, step):
            n = min(step, out.size - i)
            out[i : i + n] = convert(self._elements(offset + i * stored.itemsize, n))

    def _fill_strided(
        self,
        out: NDArray[Any],
        start: int,
        strides: tuple[int, ...],
        convert: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> None:
        # Bands along the axis with the largest stride touch separate stretches of the file, one after the
        # other, so that neither a transposed nor a column-sliced view needs its whole storage in memory.
        stored = self._stored
        axis = max(range(out.ndim), key=lambda a: strides[a] if out.shape[a] > 1 else -1)
        inner = 1 + sum(
            (n - 1) * s for a, (n, s) in enumerate(zip(out.shape, strides, strict=True)) if a != axis
        )
        step = max(1, (_BAND // stored.itemsize - inner) // max(1, strides[axis]))
        byte_strides = tuple(s * stored.itemsize for s in strides)
        origin = start * strides[0]
        for i in range(0, out.shape[axis], step):
            n = min(step, out.shape[axis] - i)
            offset = self._offset + (origin + i * strides[axis]) * stored.itemsize
            flat = self._elements(offset, (n - 1) * strides[axis] + inner)
            shape = (*out.shape[:axis], n, *out.shape[axis + 1 :])
            view = np.lib.stride_tricks.as_strided(flat, shape, byte_strides, writeable=False)
            out[(slice(None),) * axis + (slice(i, i + n),)] = convert(view)

    def _elements(self, offset: int, count: int) -> NDArray[Any]:
        """``count`` stored elements from byte ``offset``, in the machine's byte order."""
        stored = self._stored
        raw = np.empty(count, stored)
        self._source.read_into(offset, raw.view(np.uint8).data)
        return raw.astype(stored.newbyteorder("="), copy=False)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= n
    return True


def _same(raw: NDArray[Any]) -> NDArray[Any]:
    return raw


def _f64_to_f32(raw: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return raw.astype(np.float32)


def _f16_to_f32(raw: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return raw.astype(np.float32)


def _bf16_to_f32(raw: NDArray[Any]) -> NDArray[Any]:
    """A bfloat16 is the upper half of a float32."""
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _e5m2_to_f32(raw: NDArray[Any]) -> NDArray[Any]:
    """An E5M2 number is the upper half of a binary16."""
    wide = raw.astype(np.uint16)
    wide <<= 8
    return _f16_to_f32(wide.view(np.float16))


def _e4m3_to_f32(raw: NDArray[Any]) -> NDArray[Any]:
    values: NDArray[np.float32] = _e4m3_table()[raw]
    return values


@cache
def _e4m3_table() -> NDArray[np.float32]:
    """All 256 values of the OCP E4M3 type: bias 7, no infinities, NaN only where all seven bits are one."""
    code = np.arange(256, dtype=np.intc)  # what ldexp takes everywhere
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value[code & 127 == 127] = np.nan
    return np.copysign(value, np.where(code < 128, 1.0, -1.0)).astype(np.float32)


_TO_F32: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "F64": _f64_to_f32,
    "F32": _same,
    "F16": _f16_to_f32,
    "BF16": _bf16_to_f32,
    "F8_E4M3": _e4m3_to_f32,
    "F8_E5M2": _e5m2_to_f32,
}
