"""The NumPy executor of programs, with its KV cache: the oracle of the C one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._fallback_blocks import BLOCK, Matrix
from azquant._fallback_decode import DECODERS
from azquant._fallback_encode import ENCODERS
from azquant.errors import ShapeError
from azquant.program import Op, ProgramSpec, Ref, StepArrays, as_indices
from azquant.types import get_type

__all__ = ["KVCache", "Program"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


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

    def product(self, w: Matrix, x: Floats) -> Floats:
        compute = "fp32" if self.compute == "int8" and not w.can_int8 else self.compute
        return w.matmul(np.ascontiguousarray(x), compute)

    def linear(self, op: Op[Matrix]) -> Floats:
        assert op.w is not None
        y = self.product(op.w, self.view(op.a, op.w.shape[1]))
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

    def experts(self, op: Op[Matrix]) -> Floats:
        assert op.w is not None and op.activation is not None
        x = self.view(op.a, op.w.shape[1])
        ratings = op.w.matmul(np.ascontiguousarray(x), "fp32")
        chosen = np.argsort(-ratings, axis=1, kind="stable")[:, : op.n_used]  # among equals the first
        best = np.take_along_axis(ratings, chosen, axis=1)
        shares = np.exp(best - best[:, :1])
        shares /= shares.sum(axis=1, keepdims=True)
        shares[~(ratings.max(axis=1) < np.inf)] = np.nan  # as a softmax over all of them would be
        parts = np.empty((len(x), op.n_used, op.width), np.float32)
        for expert in np.unique(chosen):
            gate, up, down = op.experts[expert]
            rows, places = np.nonzero(chosen == expert)
            hidden = _ACTIVATIONS[op.activation](self.product(gate, x[rows])) * self.product(up, x[rows])
            parts[rows, places] = self.product(down, hidden)
        y: Floats = (shares[:, :, None] * parts).sum(axis=1)
        return y if op.b is None else y + self.view(op.b, op.width)

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
            likeliest = arrays.logits[:n_out].argmax(axis=1)
            memoryview(arrays.likeliest)[:n_out] = memoryview(likeliest.astype(np.int32))
