"""The NumPy backend: the entry points of ``azquant._native`` without any C.

Blocks come out byte for byte as the kernels make them. Products dequantize and use BLAS, so they agree with
the kernels within the error bounds, not bit by bit.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
from array import array
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from azquant._fallback_blocks import INT8, Matrix, dequantize, known_type, quantize, quantize_turned
from azquant._fallback_program import KVCache, Program
from azquant.errors import ArgumentError, ShapeError, UnsupportedTypeError

__all__ = [
    "NAME",
    "KVCache",
    "Matrix",
    "Program",
    "choice",
    "dequantize",
    "isas",
    "join_strings",
    "matmul_packed",
    "pack",
    "pack_all",
    "packed_bytes",
    "packed_rows",
    "peak_bf16",
    "peak_int8",
    "quantize",
    "quantize_turned",
    "refusals",
    "scan_strings",
    "set_threads",
    "stream_read",
    "threads",
    "threads_here",
    "unpack",
    "use_isa",
    "use_team",
    "vocabulary_cuts",
    "vocabulary_merges",
]

NAME = "numpy"

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


# ---- processor ---------------------------------------------------------------------------------------


def isas() -> list[tuple[str, bool]]:
    """No ISA: NumPy chooses for itself."""
    return []


def active_isa() -> str:
    """The backend's name stands for the ISA."""
    return NAME


def use_isa(name: str) -> None:
    """Always ArgumentError: there are no kernels to choose from."""
    raise ArgumentError(
        f"ISA {name!r} cannot be chosen: the NumPy backend runs (AZQUANT_BACKEND, or no C build)"
    )


def threads() -> int:
    """BLAS keeps its own threads; this is the number of processors it sees."""
    return os.cpu_count() or 1


def set_threads(n: int) -> None:
    """No effect: BLAS reads OMP_NUM_THREADS and its like when it starts."""


def threads_here(n: int) -> None:
    """No effect, as above."""


def stream_read(buffer: Bytes) -> None:
    """Reads the buffer once."""
    buffer.view(np.uint64).sum()


def peak_int8(rounds: int) -> int:
    """NumPy has no int8 products: none are done."""
    return 0


def peak_bf16(rounds: int) -> int:
    """There are no bf16 instructions here."""
    return 0


def refusals() -> dict[str, str]:
    """No ISAs here."""
    return {}


def choice(type_id: int, m: int, n: int, k: int, compute: str) -> tuple[str, str]:
    """(compute, "numpy"); compute "auto" is decided."""
    has_int8 = known_type(type_id).name in INT8
    if compute == "int8" and not has_int8:
        raise UnsupportedTypeError("there is no int8 kernel for this type")
    if compute == "auto":
        compute = "int8" if has_int8 else "fp32"
    return compute, NAME


# ---- GGUF metadata -----------------------------------------------------------------------------------


def scan_strings(
    buffer: memoryview,
    offset: int,
    count: int,
    byte_order: str,
    end: int,
    starts: npt.NDArray[np.int64] | None,
) -> int:
    """The byte after ``count`` GGUF strings from ``offset`` on; ``~at`` if the one at ``at`` passes ``end``.

    ``starts``, int64 (count + 1,), gets where each begins and, last, the byte after all of them.
    """
    length_at = struct.Struct(byte_order + "Q").unpack_from
    found = array("q", [offset])
    last = end - 8
    at = offset
    for _ in range(count):
        if offset > last:  # no room for a length: the string before reached too far, or the bytes ran out
            return ~(at if offset > end else offset)
        at = offset
        offset += 8 + length_at(buffer, offset)[0]
        if starts is not None and offset <= end:
            found.append(offset)
    if offset > end:
        return ~at
    if starts is not None:
        starts[:] = found
    return offset


def join_strings(
    buffer: memoryview, offset: int, count: int, byte_order: str, end: int, *, halves: bool
) -> bytes | None:
    """``count`` GGUF strings from ``offset`` on, a zero byte after each.

    With ``halves`` also in place of each one's first space, its first byte aside. ``None`` where a string has
    a zero byte, or no such space, or passes ``end``.
    """
    length_at, joined = struct.Struct(byte_order + "Q").unpack_from, bytearray()
    for _ in range(count):
        if end - offset < 8:
            return None
        start = offset + 8
        offset = start + length_at(buffer, offset)[0]
        text = bytes(buffer[start:offset]) if offset <= end else b"\0"
        space = text.find(b" ", 1) if halves else 0
        if 0 in text or space < 0:
            return None
        joined += text[:space] + b"\0" + text[space + 1 :] if halves else text
        joined.append(0)
    return bytes(joined)


def vocabulary_cuts(tokens: Sequence[str]) -> npt.NDArray[np.int32]:
    """Every way to cut one of ``tokens``, all different, into two others: (token, left, right), int32 (n, 3).

    In the order of the tokens, and of a token's cuts from left to right.
    """
    ids = {text: i for i, text in enumerate(tokens)}
    cuts: list[tuple[int, int, int]] = []
    # In this order every token comes after those that it begins with, which are on the stack.
    beginnings: list[str] = []
    for text in sorted(ids):
        while beginnings and not text.startswith(beginnings[-1]):
            beginnings.pop()
        for left in beginnings:
            right = ids.get(text[len(left) :]) if left else None
            if right is not None:
                cuts.append((ids[text], ids[left], right))
        beginnings.append(text)
    cuts.sort(key=itemgetter(0))
    return np.array(cuts, np.int32).reshape(-1, 3)


def vocabulary_merges(tokens: Sequence[str], scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """The left and the right tokens of :func:`vocabulary_cuts`, the token with the highest score first.

    Of equals those with the lowest left token come first, then the lowest right one; NaN comes last.
    """
    whole, left, right = vocabulary_cuts(tokens).T
    best_first = np.lexsort((right, left, -np.asarray(scores, np.float64)[whole]))
    return left[best_first].tolist(), right[best_first].tolist()


# ---- packed weights, in the caller's memory: here the GGUF bytes themselves -----------------------------


def use_team(address: int) -> None:
    """Nothing: BLAS has threads of its own."""


def pack_all(matrices: Sequence[Matrix]) -> None:
    """:meth:`Matrix.pack` of each."""
    for matrix in matrices:
        matrix.pack()


def packed_bytes(type_id: int, n: int, k: int) -> int:
    """Bytes of the packed form of a matrix (n, k)."""
    return n * known_type(type_id).row_bytes(k)


def pack(type_id: int, data: Bytes, n: int, k: int, out: Bytes, n_threads: int) -> None:
    """GGUF bytes -> ``out`` (packed_bytes,)."""
    out[:] = data


def unpack(type_id: int, packed: Bytes, n: int, k: int, n_threads: int) -> Bytes:
    """The GGUF bytes."""
    return packed.copy()


def _bytes_at(address: int, nbytes: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _floats_at(address: int, *shape: int) -> Floats:
    return _bytes_at(address, 4 * math.prod(shape)).view(np.float32).reshape(shape)


def matmul_packed(
    type_id: int,
    packed: int,
    n: int,
    k: int,
    bias: int,
    x: int,
    m: int,
    y: int,
    compute: str,
    n_threads: int,
) -> None:
    """x (m, k) -> y (m, n), float32, contiguous, plus the bias (n,) unless that is 0; all are addresses."""
    weights = Matrix(type_id, _bytes_at(packed, packed_bytes(type_id, n, k)), n, k)
    found = weights.matmul(_floats_at(x, m, k), compute)
    _floats_at(y, m, n)[:] = found + _floats_at(bias, n) if bias else found


def packed_rows(
    type_id: int, packed: Bytes, n: int, k: int, rows: npt.NDArray[np.int64], out: Floats, n_threads: int
) -> None:
    """Rows of packed weights, dequantized into ``out`` (len(rows), k)."""
    if rows.size and (rows.min() < 0 or rows.max() >= n):
        raise ShapeError(f"rows: an index is not in 0 .. {n - 1}")
    picked = np.ascontiguousarray(packed.reshape(n, -1)[rows]).reshape(-1)
    out[:] = dequantize(type_id, picked, len(rows), k)
