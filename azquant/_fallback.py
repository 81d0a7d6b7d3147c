"""The NumPy backend: the entry points of ``azquant._native`` without any C.

Blocks come out byte for byte as the kernels make them. Products dequantize and use BLAS, so they agree with
the kernels within the error bounds, not bit by bit. Its program executor is the oracle of the C one.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._fallback_decode import DECODERS
from azquant._fallback_encode import ENCODERS, SCALES_AT, TOO_LARGE
from azquant.errors import ArgumentError, InternalError, NonFiniteError, ShapeError, UnsupportedTypeError
from azquant.program import Op, ProgramSpec, Ref, StepArrays, as_indices
from azquant.types import GGMLType, get_type, type_by_id

__all__ = [
    "NAME",
    "KVCache",
    "Matrix",
    "Program",
    "choice",
    "dequantize",
    "isas",
    "matmul_packed",
    "pack",
    "packed_bytes",
    "packed_rows",
    "peak_bf16",
    "peak_int8",
    "quantize",
    "refusals",
    "scan_strings",
    "set_threads",
    "stream_read",
    "threads",
    "threads_here",
    "unpack",
    "use_isa",
    "use_team",
]

NAME = "numpy"

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

INT8: tuple[str, ...] = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
INT8 += ("iq4_nl", "iq4_xs", "mxfp4")
"""Weight types whose products the kernels compute with activations of 8 bits."""
BLOCK = 32
BAND = 1 << 20
"""Elements worked on at a time, so that temporaries stay small."""


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


# ---- GGUF metadata -----------------------------------------------------------------------------------


def peak_bf16(rounds: int) -> int:
    """There are no bf16 instructions here."""
    return 0


def refusals() -> dict[str, str]:
    """No ISAs here."""
    return {}


def choice(type_id: int, m: int, n: int, k: int, compute: str) -> tuple[str, str]:
    """(compute, "numpy"); compute "auto" is decided."""
    has_int8 = _type(type_id).name in INT8
    if compute == "int8" and not has_int8:
        raise UnsupportedTypeError("there is no int8 kernel for this type")
    if compute == "auto":
        compute = "int8" if has_int8 else "fp32"
    return compute, NAME


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


# ---- blocks ------------------------------------------------------------------------------------------


def _type(type_id: int) -> GGMLType:
    found = type_by_id(type_id)
    if found is None or found.name not in DECODERS:
        raise UnsupportedTypeError(f"type {type_id} is not supported")
    return found


def quantize(type_id: int, x: Floats, importance: Floats | None = None) -> Bytes:
    """x (rows, k) float32, contiguous -> the blocks' bytes (rows * row_bytes,); importance is (k,).

    Raises NonFiniteError with the flat index of the first element that the type cannot hold.
    """
    rows, k = x.shape
    found = _type(type_id)
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
    found = _type(type_id)
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
        if data.nbytes != n * _type(type_id).row_bytes(k):
            raise InternalError(f"{data.nbytes} bytes given for a matrix ({n}, {k}) of type {type_id}")
        self.type_id, self.shape, self._data = type_id, (n, k), data
        self._dense: Floats | None = None

    @property
    def can_int8(self) -> bool:
        """Whether the kernels have an int8 path for it, which this backend imitates."""
        return _type(self.type_id).name in INT8

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


# ---- packed weights, in the caller's memory: here the GGUF bytes themselves -----------------------------


def use_team(address: int) -> None:
    """Nothing: BLAS has threads of its own."""


def packed_bytes(type_id: int, n: int, k: int) -> int:
    """Bytes of the packed form of a matrix (n, k)."""
    return n * _type(type_id).row_bytes(k)


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


# ---- programs ----------------------------------------------------------------------------------------


class KVCache:
    """Keys and values (n_layer, n_seq, n_head_kv, n_ctx, head_dim) of ``dtype`` f32, f16 or q8_0.

    Of q8_0 the last dimension is the bytes of the blocks, of which the last is padded.
    """

    def __init__(
        self, n_layer: int, n_seq: int, n_ctx: int, n_head_kv: int, head_dim: int, dtype: str
    ) -> None:
        shape = (n_layer, n_seq, n_head_kv, n_ctx, head_dim)
        if min(shape) < 1:
            raise ShapeError(f"KV cache of shape {shape}: every number must be at least 1")
        self.n_seq, self.n_ctx, self.head_dim = n_seq, n_ctx, head_dim
        self._in_blocks = dtype == "q8_0"
        if self._in_blocks:
            shape = (*shape[:-1], get_type("q8_0").row_bytes(head_dim + -head_dim % BLOCK))
        kinds = {"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}
        self.keys: npt.NDArray[Any] = np.zeros(shape, dtype=kinds[dtype])
        self.values = np.zeros_like(self.keys)

    def encode(self, x: Floats) -> npt.NDArray[Any]:
        """``x`` (..., head_dim) as the cache keeps it. Blocks with a non-finite number become NaN."""
        if not self._in_blocks:
            return x
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -self.head_dim % BLOCK)]).reshape(-1, BLOCK)
        finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(padded), axis=1)
        data = ENCODERS["q8_0"](np.where(finite[:, None], padded, np.float32(0)), None).reshape(
            len(padded), -1
        )
        data[~finite, :2] = 0x00, 0x7E  # the scale
        return data.reshape(*x.shape[:-1], -1)

    def decode(self, kept: npt.NDArray[Any]) -> Floats:
        """The same in float32."""
        if not self._in_blocks:
            return kept.astype(np.float32)
        values: Floats = DECODERS["q8_0"](np.ascontiguousarray(kept).reshape(-1))
        return values.reshape(*kept.shape[:-1], -1)[..., : self.head_dim]

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.keys.nbytes + self.values.nbytes

    def copy(self, source: int, target: int, n: int) -> None:
        """Copies the first ``n`` positions of one sequence into another."""
        if not (0 <= source < self.n_seq and 0 <= target < self.n_seq and 0 <= n <= self.n_ctx):
            raise ShapeError(f"copy of {n} positions from sequence {source} to {target}: out of range")
        for cache in (self.keys, self.values):
            cache[:, target, :, :n] = cache[:, source, :, :n]


def _erf(x: Floats) -> Floats:
    """erf by Abramowitz and Stegun 7.1.26, in float64: absolute error below 1.5e-7."""
    magnitude = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * magnitude)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return (np.sign(x) * (1 - poly * np.exp(-magnitude * magnitude))).astype(np.float32)


def _silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def _gelu_tanh(x: Floats) -> Floats:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))


def _gelu_erf(x: Floats) -> Floats:
    return np.float32(0.5) * x * (1 + _erf(x * np.float32(0.7071067811865476)))


def _relu(x: Floats) -> Floats:
    return np.maximum(x, np.float32(0))


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "gelu_erf": _gelu_erf,
    "relu": _relu,
}


def _softcapped(x: Floats, cap: float) -> Floats:
    return np.float32(cap) * np.tanh(x / np.float32(cap))


class _Step:
    """One step: the buffers, and a method for each kind of op."""

    def __init__(
        self,
        spec: ProgramSpec[Matrix],
        kv: KVCache,
        compute: str,
        tokens: Ints,
        sequence: Ints,
        position: Ints,
        out: Ints,
    ) -> None:
        self.kv, self.compute = kv, compute
        self.tokens, self.sequence, self.position, self.out_rows = tokens, sequence, position, out
        self.data = [np.zeros((len(out if b.outputs else tokens), b.width), np.float32) for b in spec.buffers]

    def view(self, ref: Ref | None, width: int) -> Floats:
        assert ref is not None
        return self.data[ref.buffer][:, ref.col : ref.col + width]

    def run(self, op: Op[Matrix]) -> None:
        result: Floats = getattr(self, op.kind)(op)
        self.view(op.out, op.width)[:] = result

    def embed(self, op: Op[Matrix]) -> Floats:
        assert op.w is not None
        x = op.w.rows(self.tokens) * np.float32(op.scale)
        return x if op.w2 is None else x + op.w2.rows(self.position)

    def heads(self, op: Op[Matrix]) -> Floats:
        """(rows, n_head, width of a head) of what a norm reads; one head where the norm is over the whole."""
        x = self.view(op.a, op.width)
        return x.reshape(len(x), max(op.n_head, 1), op.width // max(op.n_head, 1))

    def layer_norm(self, op: Op[Matrix]) -> Floats:
        assert op.vec0 is not None
        x = self.heads(op)
        centred = x - x.mean(axis=2, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(axis=2, keepdims=True) + np.float32(op.eps)) * op.vec0
        return (y if op.vec1 is None else y + op.vec1).reshape(-1, op.width)

    def rms_norm(self, op: Op[Matrix]) -> Floats:
        assert op.vec0 is not None
        x = self.heads(op)
        y = x / np.sqrt((x * x).mean(axis=2, keepdims=True) + np.float32(op.eps)) * op.vec0
        return y.reshape(-1, op.width)

    def linear(self, op: Op[Matrix]) -> Floats:
        assert op.w is not None
        compute = "fp32" if self.compute == "int8" and not op.w.can_int8 else self.compute
        y = op.w.matmul(np.ascontiguousarray(self.view(op.a, op.w.shape[1])), compute)
        y = y if op.vec0 is None else y + op.vec0
        y = y if op.activation is None else _ACTIVATIONS[op.activation](y)
        return y if op.b is None else y + self.view(op.b, op.width)

    def rope(self, op: Op[Matrix]) -> Floats:
        assert op.vec0 is not None
        x = self.view(op.out, op.width).reshape(-1, op.n_head, op.head_dim).copy()
        angles = (self.position[:, None].astype(np.float32) * op.vec0).astype(np.float64)[:, None, :]
        cosines = np.cos(angles).astype(np.float32) * np.float32(op.scale)
        sines = np.sin(angles).astype(np.float32) * np.float32(op.scale)
        half = op.n_rot // 2
        pair = (
            (slice(0, half), slice(half, op.n_rot))
            if op.rope_neox
            else (slice(0, op.n_rot, 2), slice(1, op.n_rot, 2))
        )
        first, second = x[..., pair[0]].copy(), x[..., pair[1]].copy()
        x[..., pair[0]] = first * cosines - second * sines
        x[..., pair[1]] = first * sines + second * cosines
        return x.reshape(-1, op.width)

    def attention(self, op: Op[Matrix]) -> Floats:
        heads, kv_heads, dim = op.n_head, op.n_head_kv, op.head_dim
        qkv = self.view(op.a, (heads + 2 * kv_heads) * dim).reshape(-1, heads + 2 * kv_heads, dim)
        keys, values = self.kv.keys[op.layer], self.kv.values[op.layer]
        with np.errstate(over="ignore"):
            keys[self.sequence, :, self.position] = self.kv.encode(qkv[:, heads : heads + kv_heads])
            values[self.sequence, :, self.position] = self.kv.encode(qkv[:, heads + kv_heads :])
        out = np.empty((len(self.tokens), heads, dim), np.float32)
        for row, (sequence, position) in enumerate(zip(self.sequence, self.position, strict=True)):
            seen = slice(max(0, position + 1 - op.window) if op.window else 0, position + 1)
            past_k = self.kv.decode(keys[sequence, :, seen])  # (kv heads, positions, dim)
            past_v = self.kv.decode(values[sequence, :, seen])
            query = qkv[row, :heads].reshape(kv_heads, heads // kv_heads, dim)
            scores = np.float32(op.scale) * (query @ past_k.transpose(0, 2, 1))
            if op.softcap:
                scores = _softcapped(scores, op.softcap)
            weights = np.exp(scores - scores.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
            out[row] = (weights @ past_v).reshape(heads, dim)
        return out.reshape(len(out), -1)

    def glu(self, op: Op[Matrix]) -> Floats:
        assert op.activation is not None
        return _ACTIVATIONS[op.activation](self.view(op.a, op.width)) * self.view(op.b, op.width)

    def select(self, op: Op[Matrix]) -> Floats:
        return self.view(op.a, op.width)[self.out_rows]

    def add(self, op: Op[Matrix]) -> Floats:
        return self.view(op.a, op.width) * np.float32(op.scale) + self.view(op.b, op.width)

    def softcap(self, op: Op[Matrix]) -> Floats:
        return _softcapped(self.view(op.a, op.width), op.softcap)


class Program:
    """A program for the NumPy executor."""

    def __init__(self, spec: ProgramSpec[Matrix]) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self.n_vocab = spec.n_vocab
        embeds = [op for op in spec.ops if op.kind == "embed" and op.w is not None]
        self._seconds: npt.NDArray[np.float64] | None = None
        self._n_tokens = min(op.w.shape[0] for op in embeds if op.w is not None)
        self._n_positions = min((op.w2.shape[0] for op in embeds if op.w2 is not None), default=1 << 62)

    def step(
        self,
        kv: KVCache,
        compute: str,
        tokens: Sequence[int] | Ints,
        sequence: Sequence[int] | Ints,
        position: Sequence[int] | Ints,
        out_rows: Sequence[int] | Ints,
    ) -> Floats:
        """One step over a ragged batch -> logits (len(out_rows), n_vocab) float32."""
        t, s, p, o = map(as_indices, (tokens, sequence, position, out_rows))
        if not len(t) == len(s) == len(p):
            raise ShapeError(
                f"step of {len(t)} tokens, {len(s)} sequences, {len(p)} positions: must be equal"
            )
        limits = ((t, self._n_tokens), (s, kv.n_seq), (p, min(kv.n_ctx, self._n_positions)), (o, len(t)))
        if any(v.size and (v.min() < 0 or v.max() >= limit) for v, limit in limits):
            raise ShapeError(f"step of {len(t)} tokens: an index is out of range")
        needed = (self._spec.n_layer, self._spec.n_head_kv, self._spec.head_dim)
        if kv.keys.shape[0] < needed[0] or (kv.keys.shape[2], kv.head_dim) != needed[1:]:
            raise ShapeError(f"step of {len(t)} tokens: the KV cache was made for another model")
        step = _Step(self._spec, kv, compute, t, s, p, o)
        if not len(t):
            return step.data[self._spec.ops[-1].out.buffer]
        with self._lock, np.errstate(all="ignore"):
            for i, op in enumerate(self._spec.ops):
                begun = time.perf_counter()
                step.run(op)
                if self._seconds is not None:
                    self._seconds[i] += time.perf_counter() - begun
        return step.data[self._spec.ops[-1].out.buffer]

    def measure(self, seconds: npt.NDArray[np.float64] | None) -> None:
        """From now on every step adds to ``seconds`` (ops,) what each op took; ``None`` ends it."""
        with self._lock:
            self._seconds = seconds

    def run(
        self, kv: KVCache, compute: str, arrays: StepArrays, n_tokens: int, n_out: int, *, choose: bool
    ) -> None:
        """One step over the first ``n_tokens`` tokens and ``n_out`` outputs of ``arrays``."""
        ints = (arrays.tokens[:n_tokens], arrays.sequence[:n_tokens], arrays.position[:n_tokens])
        arrays.logits[:n_out] = self.step(kv, compute, *ints, arrays.out_rows[:n_out])
        if choose:
            arrays.likeliest[:n_out] = arrays.logits[:n_out].argmax(axis=1)
