"""quantize, dequantize, matmul: NumPy arrays in and out, the kernels in between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._backend import kernels
from azquant.cpu import COMPUTE_MODES, _prepare
from azquant.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError, UnsupportedTypeError
from azquant.tensor import QTensor
from azquant.types import GGMLType, get_type

__all__ = ["COMPUTE_MODES", "dequantize", "encode_columns", "encode_rows", "matmul", "quantize"]

Floats = npt.NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)


def as_float32(x: Any, what: str) -> Floats:
    """``x`` as a C-contiguous, aligned float32 array.

    Takes float16, bfloat16 (ml_dtypes), float32 and float64.
    """
    if type(x) is np.ndarray and x.ndim and x.dtype == _FLOAT32 and x.flags.carray:
        return x  # the usual case, sooner than np.require finds out
    array = np.asarray(x)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise DTypeError(f"{what} must be floating point, not {array.dtype}")
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite, and is reported as such
        return np.require(array, np.float32, ["C_CONTIGUOUS", "ALIGNED"])


def _encode(
    x: Floats, type: GGMLType, tensor: str | None, first_row: int, importance: Floats | None = None
) -> npt.NDArray[np.uint8]:
    if not type.can_quantize:
        raise UnsupportedTypeError(f"azquant cannot quantize to {type} yet")
    type.row_bytes(x.shape[1])
    _prepare()
    try:
        encoded: npt.NDArray[np.uint8] = kernels().quantize(type.id, x, importance)
    except NonFiniteError as error:
        raise _not_representable(x, error.index, type, tensor, first_row) from None
    return encoded


def _not_representable(
    x: Floats, index: int, type: GGMLType, tensor: str | None, first_row: int
) -> NonFiniteError:
    row, column = divmod(index, x.shape[1])
    value = float(x[row, column])
    name = "" if tensor is None else f"tensor {tensor!r}: "
    why = f"is too large for {type}" if math.isfinite(value) else f"cannot be stored as {type}"
    row += first_row
    return NonFiniteError(
        f"{name}{value} at row {row}, column {column} {why}; mend the weights first",
        index=row * x.shape[1] + column,
        tensor=tensor,
    )


def encode_rows(
    x: Floats,
    type: GGMLType,
    *,
    importance: Floats | None = None,
    tensor: str | None = None,
    first_row: int = 0,
) -> npt.NDArray[np.uint8]:
    """Rows of float32 as the bytes that GGUF stores, equal to ggml's reference quantizer's.

    ``x`` is (rows, K), contiguous; the result is uint8 (rows * type.row_bytes(K),). ``importance`` is (K,),
    float32, contiguous, finite and not negative: how much an error in each column counts. ``tensor`` and
    ``first_row`` place the rows for error messages when they are a band of a larger tensor.

    Raises NonFiniteError naming tensor, row and column of the first NaN, infinity, or number too large for
    the type; ShapeError when K is no whole number of blocks; UnsupportedTypeError.
    """
    encoded = _encode(x, type, tensor, first_row, importance)
    infinite = _infinite(encoded, type)
    if infinite is not None and infinite.any():
        raise _not_representable(x, int(infinite.argmax()), type, tensor, first_row)
    return encoded


def encode_columns(bands: Iterable[Floats], type: GGMLType, out: npt.NDArray[np.uint8]) -> None:
    """The transpose of a matrix as the bytes that GGUF stores, one row of ``out`` for each column.

    ``bands`` are the matrix's rows from first to last, each (some, N), contiguous, with whole blocks in the
    columns; ``out`` is uint8 (N, bytes of a whole column), contiguous.

    Raises NonFiniteError, which does not know where; ShapeError; UnsupportedTypeError.
    """
    if not type.can_quantize:
        raise UnsupportedTypeError(f"azquant cannot quantize to {type} yet")
    _prepare()
    at = 0
    for band in bands:
        kernels().quantize_turned(type.id, band, out, at)
        at += type.row_bytes(band.shape[0])
    infinite = _infinite(out.reshape(-1), type)
    if infinite is not None and infinite.any():
        raise NonFiniteError(f"a number is too large for {type}", index=-1)


def _infinite(encoded: npt.NDArray[np.uint8], type: GGMLType) -> npt.NDArray[np.bool_] | None:
    """Which numbers became infinite, of the types that have an infinity."""
    infinity = {"f16": 0x7C00, "bf16": 0x7F80}.get(type.name)
    return None if infinity is None else encoded.view("<u2") & 0x7FFF == infinity


def quantize(w: Any, type: str | GGMLType = "q4_0", *, imatrix: Any = None) -> QTensor:
    """Quantizes an array ``(..., K)`` of float16, bfloat16, float32 or float64 along its last axis.

    The bytes equal those of ggml's reference quantizer on x86-64, on every ISA and for any thread count.
    ``imatrix`` is an importance matrix's row (K,): how much an error in each column counts; f32, f16, bf16,
    q8_0, mxfp4, tq1_0 and tq2_0 take no notice of it.
    For ``"f16"`` and ``"bf16"`` numbers too large become infinite, as in any IEEE conversion.

    Raises DTypeError, ShapeError (no dimension, K no whole number of blocks, ``imatrix`` of another length),
    NonFiniteError (with ``.index``, flat), ArgumentError (an importance that is negative or not finite),
    UnsupportedTypeError.

    >>> q = azquant.quantize(numpy.ones((2, 64), "f4"), "q4_0")
    >>> q.nbytes
    72
    """
    found = get_type(type)
    x = as_float32(w, "weights")
    if np.ndim(w) == 0:
        raise ShapeError("weights must have at least one dimension")
    rows = math.prod(x.shape[:-1])
    importance = None if imatrix is None else _as_importance(imatrix, x.shape[-1])
    return QTensor(_encode(x.reshape(rows, x.shape[-1]), found, None, 0, importance), x.shape, found)


def _as_importance(imatrix: Any, k: int) -> Floats:
    importance = as_float32(imatrix, "the importances")
    if importance.shape != (k,):
        raise ShapeError(
            f"rows of {k} elements need {k} importances, not an array of shape {importance.shape}"
        )
    if not (np.isfinite(importance) & (importance >= 0)).all():
        raise ArgumentError("importances must be finite and not negative")
    return importance


def dequantize(q: QTensor) -> Floats:
    """The values of ``q`` as float32; the same as ``q.dequantize()``."""
    return q.dequantize()


def matmul(x: Any, w: QTensor, compute: str = "auto") -> Floats:
    """``x`` (..., K) times the transpose of ``w`` (N, K) -> float32 (..., N).

    ``compute``: ``"int8"`` (Q4_0 to Q8_0, K-quants, IQ4_NL, IQ4_XS, MXFP4) quantizes activations to 8 bits
    per 32; the same bits on every ISA, thread count and batch size, and a relative L2 error of at most 1%
    against exact arithmetic on the dequantized weights (of ordinary activations and more than a handful of
    outputs). ``"bf16"`` rounds weights and activations to bfloat16 and sums in float32 (at most 0.6%): the
    same bits for any thread count and batch size, and on all of scalar, AVX2, AVX-VNNI and AVX-512 VNNI;
    AVX512-BF16 and AMX add in an order of their own, so between these only the bound holds. ``"fp32"``
    dequantizes the weights (at most 1e-5).
    ``"auto"`` takes the fastest that the type allows, see :func:`azquant.cpu.choice`. A row of x with NaN or
    infinity gives NaN (bf16 and fp32: or infinity), not an error.

    Raises DTypeError, ShapeError, ArgumentError, UnsupportedTypeError (int8 asked of a type without it).
    """
    if compute not in COMPUTE_MODES:
        raise ArgumentError(f"compute={compute!r}: must be one of {', '.join(COMPUTE_MODES)}")
    if not isinstance(w, QTensor):
        raise DTypeError(f"the weights must be a QTensor, not {w.__class__.__name__}; see azquant.quantize")
    activations = as_float32(x, "x")
    if activations is not x and np.ndim(x) == 0:  # np.require makes one dimension of none
        raise ShapeError("x must have at least one dimension")
    n, k = w.matrix.shape
    if activations.shape[-1] != k:
        raise ShapeError(f"x has {activations.shape[-1]} columns, the weights {w.shape} need {k}")
    y: Floats
    if activations.ndim == 2:
        y = w.matrix.matmul(activations, compute)
        return y
    lead = activations.shape[:-1]
    y = w.matrix.matmul(activations.reshape(math.prod(lead), k), compute)
    return y.reshape(*lead, n)
