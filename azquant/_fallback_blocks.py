"""Blocks and products of the NumPy backend."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from azquant._fallback_decode import DECODERS
from azquant._fallback_encode import ENCODERS, SCALES_AT, TOO_LARGE
from azquant.errors import InternalError, NonFiniteError, UnsupportedTypeError
from azquant.types import GGMLType, type_by_id

__all__ = ["BLOCK", "INT8", "Matrix", "dequantize", "known_type", "quantize", "quantize_turned"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

INT8: tuple[str, ...] = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
INT8 += ("iq4_nl", "iq4_xs", "mxfp4")
"""Weight types whose products the kernels compute with activations of 8 bits."""
BLOCK = 32
BAND = 1 << 20
"""Elements worked on at a time, so that temporaries stay small."""


def known_type(type_id: int) -> GGMLType:
    """The type of this number, if its blocks can be read; else UnsupportedTypeError."""
    found = type_by_id(type_id)
    if found is None or found.name not in DECODERS:
        raise UnsupportedTypeError(f"type {type_id} is not supported")
    return found


def quantize(type_id: int, x: Floats, importance: Floats | None = None) -> Bytes:
    """x (rows, k) float32, contiguous -> the blocks' bytes (rows * row_bytes,); importance is (k,).

    Raises NonFiniteError with the flat index of the first element that the type cannot hold.
    """
    rows, k = x.shape
    found = known_type(type_id)
    if found.name not in ENCODERS:
        raise UnsupportedTypeError(f"type {found} cannot be quantized to")
    row_bytes = found.row_bytes(k)
    out = np.empty(rows * row_bytes, dtype=np.uint8)
    if not x.size:
        return out
    band = max(1, BAND // k)
    for first in range(0, rows, band):
        piece = np.ascontiguousarray(x[first : first + band])
        good = np.abs(piece) < (TOO_LARGE if found.name in SCALES_AT else np.inf)
        bad = -1 if good.all() else int(np.argmin(good))
        if bad < 0:
            with np.errstate(all="ignore"):  # subnormal scales and their infinite inverses are meant
                blocks = ENCODERS[found.name](piece, importance).reshape(-1)
            out[first * row_bytes : first * row_bytes + blocks.size] = blocks
            bad = _find_overflow(found, blocks.reshape(-1, found.block_bytes), piece)
        if bad >= 0:
            index = first * k + bad
            raise NonFiniteError(f"element {index} cannot be represented", index=index)
    return out


def quantize_turned(type_id: int, x: Floats, out: Bytes, at: int) -> None:
    """x (k, n) float32, contiguous -> its columns' blocks, from byte ``at`` of each row of out (n, bytes).

    Raises NonFiniteError, without an index.
    """
    try:
        blocks = quantize(type_id, np.ascontiguousarray(x.T)).reshape(x.shape[1], -1)
    except NonFiniteError as error:
        raise NonFiniteError("an element cannot be represented", index=-1) from error
    out[:, at : at + blocks.shape[1]] = blocks


def _find_overflow(found: GGMLType, blocks: Bytes, x: Floats) -> int:
    """Index of the largest element of the first block with an infinite or NaN scale; -1 when none has."""
    first = -1
    broken = np.zeros(len(blocks), dtype=bool)
    for at in SCALES_AT.get(found.name, ()):
        broken |= blocks[:, at + 1] & 0x7C == 0x7C
    if broken.any():
        block = int(broken.argmax())
        elements = x.reshape(-1, found.block_size)[block]
        first = block * found.block_size + int(np.abs(elements).argmax())
    return first


def dequantize(type_id: int, data: Bytes, rows: int, k: int) -> Floats:
    """data (rows * row_bytes,) -> (rows, k) float32."""
    found = known_type(type_id)
    row_bytes = found.row_bytes(k)
    out = np.empty((rows, k), dtype=np.float32)
    if not out.size:
        return out
    band = max(1, BAND // k)
    data = np.ascontiguousarray(data)
    with np.errstate(all="ignore"):  # infinite scales in a broken file
        for first in range(0, rows, band):
            piece = data[first * row_bytes : (first + band) * row_bytes]
            out[first : first + band] = DECODERS[found.name](piece).reshape(-1, k)
    return out


def _round_activations(x: Floats) -> Floats:
    """x as the int8 kernels see it: per 32 elements, d * RNE(x / d) with d = amax / 127."""
    blocks = x.reshape(-1, BLOCK)
    with np.errstate(all="ignore"):
        amax = np.abs(blocks).max(axis=1, keepdims=True)
        inverse = np.float32(127) / amax
        q = np.clip(np.rint(blocks * inverse), -127, 127)
        rounded = np.where(np.isfinite(inverse), q * (amax / np.float32(127)), np.float32(0))
        rounded = np.where(np.isfinite(blocks).all(axis=1, keepdims=True), rounded, np.float32(np.nan))
    return rounded.astype(np.float32).reshape(x.shape)


def _round_bf16(x: Floats) -> Floats:
    """x rounded to bf16, to nearest even; subnormal numbers become 0, as the bf16 instructions have it."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
    rounded = np.where(bits & 0x7F800000, rounded, bits & np.uint32(0x80000000)).astype(np.uint32)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


class Matrix:
    """A weight matrix (n, k) over GGUF bytes. Packing keeps its float32 form for BLAS."""

    def __init__(self, type_id: int, data: Bytes, n: int, k: int) -> None:
        if data.nbytes != n * known_type(type_id).row_bytes(k):
            raise InternalError(f"{data.nbytes} bytes given for a matrix ({n}, {k}) of type {type_id}")
        self.type_id, self.shape, self._data = type_id, (n, k), data
        self._dense: Floats | None = None

    @property
    def can_int8(self) -> bool:
        """Whether the kernels have an int8 path for it, which this backend imitates."""
        return known_type(self.type_id).name in INT8

    def pack(self) -> None:
        """Keeps the dequantized matrix, so that products need not make it again."""
        if self._dense is None:
            self._dense = dequantize(self.type_id, self._data, *self.shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the GGUF form."""
        return self._data.nbytes

    @property
    def pack_bytes(self) -> int:
        """Bytes that :meth:`pack` takes."""
        return 4 * self.shape[0] * self.shape[1]

    def packed_bytes(self) -> int:
        """Bytes that :meth:`pack` keeps, 0 before."""
        return 0 if self._dense is None else self._dense.nbytes

    def unpack(self) -> Bytes:
        """The GGUF bytes, which this backend never lost."""
        return self._data.copy()

    def dense(self) -> Floats:
        """(n, k) float32."""
        return dequantize(self.type_id, self._data, *self.shape) if self._dense is None else self._dense

    def rows(self, indices: Ints) -> Floats:
        """(len(indices), k) float32: the rows asked for."""
        if self._dense is not None:
            return self._dense[indices]
        n, k = self.shape
        picked = self._data.reshape(n, -1)[indices]
        return dequantize(self.type_id, np.ascontiguousarray(picked).reshape(-1), len(indices), k)

    def matmul(self, x: Floats, compute: str) -> Floats:
        """x (m, k) float32 -> (m, n)."""
        if compute == "int8" and not self.can_int8:
            raise UnsupportedTypeError("matmul: this weight type has no int8 path")
        if self.can_int8 and compute in ("auto", "int8"):
            x = _round_activations(x)
        with np.errstate(all="ignore"):
            if compute == "bf16":
                y = _round_bf16(x) @ _round_bf16(self.dense()).T
            else:
                y = x @ self.dense().T
        return y.astype(np.float32, copy=False)
