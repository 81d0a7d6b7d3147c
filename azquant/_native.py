"""The C kernels. The only module that imports the extension; everything it hands on is typed.

Its entry points are those of ``azquant._fallback``; ``azquant._backend`` picks one of the two.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from azquant._lazy import np
from azquant.errors import (
    ArgumentError,
    InternalError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    UnsupportedTypeError,
)
from azquant.program import Op, ProgramSpec, StepArrays, as_indices

from azquant._azquant import ffi, lib  # isort: skip  (raises ImportError when it was not built)

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

NAME = "c"

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes: TypeAlias = npt.NDArray[np.uint8]
    Floats: TypeAlias = npt.NDArray[np.float32]
    Ints: TypeAlias = npt.NDArray[np.int32]

COMPUTE = {
    "auto": lib.AZQ_COMPUTE_AUTO,
    "int8": lib.AZQ_COMPUTE_INT8,
    "bf16": lib.AZQ_COMPUTE_BF16,
    "fp32": lib.AZQ_COMPUTE_FP32,
}
ACTIVATIONS = {
    None: lib.AZQ_ACT_NONE,
    "gelu_tanh": lib.AZQ_ACT_GELU_TANH,
    "gelu_erf": lib.AZQ_ACT_GELU_ERF,
    "silu": lib.AZQ_ACT_SILU,
    "relu": lib.AZQ_ACT_RELU,
}
KINDS = {
    "embed": lib.AZQ_OP_EMBED,
    "layer_norm": lib.AZQ_OP_LAYER_NORM,
    "rms_norm": lib.AZQ_OP_RMS_NORM,
    "linear": lib.AZQ_OP_LINEAR,
    "rope": lib.AZQ_OP_ROPE,
    "attention": lib.AZQ_OP_ATTENTION,
    "glu": lib.AZQ_OP_GLU,
    "select": lib.AZQ_OP_SELECT,
    "add": lib.AZQ_OP_ADD,
    "softcap": lib.AZQ_OP_SOFTCAP,
    "experts": lib.AZQ_OP_EXPERTS,
}


def raise_status(status: int, what: str) -> NoReturn:
    """The one place that turns a C status into an exception."""
    name = ffi.string(lib.azq_status_name(status)).decode()
    message = f"{what}: {name}"
    if status == lib.AZQ_E_NOMEM:
        raise OutOfMemoryError(message)
    if status in (lib.AZQ_E_SHAPE, lib.AZQ_E_INDEX):
        raise ShapeError(message)
    if status == lib.AZQ_E_TYPE:
        raise UnsupportedTypeError(message)
    if status == lib.AZQ_E_ISA:
        raise ArgumentError(message)
    raise InternalError(f"{message}; please report this")


def check(status: int, what: str) -> None:
    """Raises unless ``status`` is AZQ_OK."""
    if status != lib.AZQ_OK:
        raise_status(status, what)


def _floats(numbers: Floats | array[float] | memoryview[float]) -> Any:
    return ffi.from_buffer("float[]", numbers)


def _bytes(data: Bytes | memoryview) -> Any:
    return ffi.from_buffer("uint8_t[]", data)


# ---- processor ---------------------------------------------------------------------------------------


def isas() -> list[tuple[str, bool]]:
    """Every ISA compiled in, plainest first, and whether this machine can run it."""
    return [
        (ffi.string(lib.azq_isa_name(i)).decode(), bool(lib.azq_isa_usable(i)))
        for i in range(lib.azq_isa_count())
    ]


def refusals() -> dict[str, str]:
    """Why an ISA cannot be used, for each that cannot."""
    names = [(i, ffi.string(lib.azq_isa_name(i)).decode()) for i in range(lib.azq_isa_count())]
    return {
        name: ffi.string(lib.azq_isa_refusal(i)).decode() for i, name in names if not lib.azq_isa_usable(i)
    }


def choice(type_id: int, m: int, n: int, k: int, compute: str) -> tuple[str, str]:
    """(compute, ISA of its kernel) for x of m rows and weights (n, k); compute "auto" is decided."""
    mode = COMPUTE[compute]
    if mode == lib.AZQ_COMPUTE_AUTO:
        mode = lib.azq_choice(type_id, m, n, k)
    isa = lib.azq_choice_isa(type_id, mode)
    if isa == ffi.NULL:
        raise UnsupportedTypeError(f"there is no {compute} kernel for this type")
    return next(name for name, value in COMPUTE.items() if value == mode), ffi.string(isa).decode()


def active_isa() -> str:
    """The ISA in use."""
    name: str = ffi.string(lib.azq_isa_active()).decode()
    return name


def use_isa(name: str) -> None:
    """Switches to one of ``isas()``; the caller has checked the name."""
    check(lib.azq_isa_use(name.encode()), f"ISA {name!r}")


def threads() -> int:
    """Threads that each call uses."""
    return int(lib.azq_threads())


def set_threads(n: int) -> None:
    """Sets the threads that each call uses, clamped to what the pool allows."""
    lib.azq_threads_set(min(n, 1 << 20))


def threads_here(n: int) -> None:
    """Calls of this Python thread use ``n`` threads instead, until 0 is given."""
    lib.azq_threads_here(n)


def stream_read(buffer: Bytes) -> None:
    """Reads the buffer once, over the threads."""
    lib.azq_stream_read(ffi.from_buffer(buffer), buffer.nbytes)


def peak_int8(rounds: int) -> int:
    """Does int8 multiply-adds out of registers on every thread; returns their number."""
    return int(lib.azq_peak_int8(rounds))


def peak_bf16(rounds: int) -> int:
    """The same for bf16; 0 where the active ISA has no bf16 instructions."""
    return int(lib.azq_peak_bf16(rounds))


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
    return int(
        lib.azq_gguf_strings(
            ffi.from_buffer(buffer),
            min(end, len(buffer)),
            offset,
            count,
            byte_order == ">",
            ffi.NULL if starts is None else ffi.from_buffer("int64_t[]", starts),
        )
    )


def join_strings(
    buffer: memoryview, offset: int, count: int, byte_order: str, end: int, *, halves: bool
) -> bytes | None:
    """``count`` GGUF strings from ``offset`` on, a zero byte after each.

    With ``halves`` also in place of each one's first space, its first byte aside. ``None`` where a string has
    a zero byte, or no such space, or passes ``end``.
    """
    out = ffi.new("uint8_t[]", max(0, end - offset) + 1)
    source = ffi.from_buffer(buffer)
    size = lib.azq_gguf_join(source, min(end, len(buffer)), offset, count, byte_order == ">", halves, out)
    return None if size < 0 else bytes(ffi.buffer(out, size))


def _cuts(tokens: Sequence[str]) -> tuple[Any, int]:
    """Of :func:`vocabulary_cuts`: the C array, and how many there are."""
    texts = [token.encode("utf-8", "surrogatepass") for token in tokens]  # a cut in a character finds nothing
    text, ends = b"".join(texts), array("q", accumulate(map(len, texts)))
    seed = int.from_bytes(os.urandom(8), "little")
    found, capacity = ffi.new("int64_t *", 2 * len(texts)), -1
    while found[0] > capacity:
        capacity = found[0]
        cuts = ffi.new("int32_t[]", 3 * capacity)
        status = lib.azq_vocabulary_cuts(
            ffi.from_buffer("uint8_t[]", text),
            ffi.from_buffer("int64_t[]", ends),
            len(texts),
            seed,
            cuts,
            capacity,
            found,
        )
        check(status, "cutting tokens")
    return cuts, int(found[0])


def vocabulary_cuts(tokens: Sequence[str]) -> Ints:
    """Every way to cut one of ``tokens``, all different, into two others: (token, left, right), int32 (n, 3).

    In the order of the tokens, and of a token's cuts from left to right.
    """
    cuts, n = _cuts(tokens)
    return np.frombuffer(ffi.buffer(cuts, 12 * n), np.int32).reshape(n, 3)


def vocabulary_merges(tokens: Sequence[str], scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """The left and the right tokens of :func:`vocabulary_cuts`, the token with the highest score first.

    Of equals those with the lowest left token come first, then the lowest right one; NaN comes last.
    """
    cuts, n = _cuts(tokens)
    numbers = array("d", scores)
    check(lib.azq_vocabulary_sort(cuts, n, ffi.from_buffer("double[]", numbers)), "sorting cuts of tokens")
    flat: list[int] = ffi.unpack(cuts, 3 * n)
    return flat[1::3], flat[2::3]


# ---- rows of blocks ----------------------------------------------------------------------------------


def quantize(type_id: int, x: Floats, importance: Floats | None = None) -> Bytes:
    """x (rows, k) float32, contiguous -> the blocks' bytes (rows * row_bytes,); importance is (k,).

    Raises NonFiniteError with the flat index of the first element that the type cannot hold.
    """
    rows, k = x.shape
    row_bytes = lib.azq_row_bytes(type_id, k)
    if row_bytes < 0:
        raise ShapeError(f"rows of {k} elements are no whole number of blocks")
    out = np.empty(rows * row_bytes, dtype=np.uint8)
    bad = ffi.new("int64_t *")
    weights = ffi.NULL if importance is None else _floats(importance)
    status = lib.azq_quantize_weighted(type_id, _floats(x), rows, k, weights, _bytes(out), bad)
    if status in (lib.AZQ_E_NONFINITE, lib.AZQ_E_RANGE):
        raise NonFiniteError(f"element {bad[0]} cannot be represented", index=int(bad[0]))
    check(status, "quantize")
    return out


def quantize_turned(type_id: int, x: Floats, out: Bytes, at: int) -> None:
    """x (k, n) float32, contiguous -> its columns' blocks, from byte ``at`` of each row of out (n, bytes).

    Raises NonFiniteError, without an index.
    """
    k, n = x.shape
    row_bytes = lib.azq_row_bytes(type_id, k)
    if row_bytes < 0:
        raise ShapeError(f"columns of {k} elements are no whole number of blocks")
    if at < 0 or out.shape[0] != n or at + row_bytes > out.shape[1]:
        raise InternalError(f"columns of {row_bytes} bytes given for rows {out.shape} from byte {at}")
    place = _bytes(out) + at
    status = lib.azq_quantize_turned(type_id, _floats(x), k, n, place, out.shape[1])
    if status in (lib.AZQ_E_NONFINITE, lib.AZQ_E_RANGE):
        raise NonFiniteError("an element cannot be represented", index=-1)
    check(status, "quantize")


def dequantize(type_id: int, data: Bytes, rows: int, k: int) -> Floats:
    """data (rows * row_bytes,) -> (rows, k) float32."""
    out = np.empty((rows, k), dtype=np.float32)
    check(lib.azq_dequantize(type_id, _bytes(data), rows, k, _floats(out)), "dequantize")
    return out


class Matrix:
    """A weight matrix (n, k) over GGUF bytes, which it keeps alive."""

    def __init__(self, type_id: int, data: Bytes | memoryview, n: int, k: int) -> None:
        if data.nbytes != n * lib.azq_row_bytes(type_id, k):
            raise InternalError(f"{data.nbytes} bytes given for a matrix ({n}, {k}) of type {type_id}")
        self.type_id, self.shape, self._data = type_id, (n, k), data
        handle = ffi.new("azq_matrix **")
        check(lib.azq_matrix_create(type_id, _bytes(data), n, k, handle), "matrix")
        self._handle = ffi.gc(handle[0], lib.azq_matrix_free)

    @property
    def handle(self) -> Any:
        """The C pointer."""
        return self._handle

    @property
    def can_int8(self) -> bool:
        """Whether there is a packed form and an int8 kernel."""
        return bool(lib.azq_has_int8(self.type_id))

    def pack(self) -> None:
        """Makes the packed copy; nothing happens when there is one, or when the type has none."""
        if self.can_int8:
            check(lib.azq_matrix_pack(self._handle), "pack")

    @property
    def data_bytes(self) -> int:
        """Bytes of the GGUF form."""
        return self._data.nbytes

    @property
    def pack_bytes(self) -> int:
        """Bytes that :meth:`pack` takes, 0 where the type has no packed form."""
        return int(lib.azq_packed_bytes(self.type_id, *self.shape)) if self.can_int8 else 0

    def packed_bytes(self) -> int:
        """Bytes of the packed copy, 0 without."""
        return int(lib.azq_matrix_packed_bytes(self._handle))

    def unpack(self) -> Bytes:
        """The GGUF bytes, made back from the packed copy."""
        out = np.empty(self._data.nbytes, dtype=np.uint8)
        check(lib.azq_matrix_unpack(self._handle, _bytes(out)), "unpack")
        return out

    def matmul(self, x: Floats, compute: str) -> Floats:
        """x (m, k) float32, contiguous -> (m, n)."""
        m = x.shape[0]
        n, k = self.shape
        y: Floats = (np.empty if k else np.zeros)((m, n), np.float32)
        from_buffer = ffi.from_buffer
        status = lib.azq_matmul(
            self._handle, from_buffer("float[]", x), m, k, from_buffer("float[]", y), n, COMPUTE[compute]
        )
        if status != lib.AZQ_OK:
            raise_status(status, "matmul")
        return y


def pack_all(matrices: Sequence[Matrix]) -> None:
    """:meth:`Matrix.pack` of each, without waiting for the interpreter between them."""
    handles = [matrix.handle for matrix in matrices if matrix.can_int8]
    check(lib.azq_matrices_pack(ffi.new("azq_matrix *[]", handles), len(handles)), "pack")


# ---- packed weights, in the caller's memory -----------------------------------------------------------


def use_team(address: int) -> None:
    """Runs the calls that take ``n_threads`` on the threads of a GOMP_parallel; 0 for the pool of its own."""
    lib.azq_team_set(ffi.cast("azq_team_fn *", address))


def packed_bytes(type_id: int, n: int, k: int) -> int:
    """Bytes of the packed form of a matrix (n, k)."""
    return int(lib.azq_packed_bytes(type_id, n, k))


def pack(type_id: int, data: Bytes, n: int, k: int, out: Bytes, n_threads: int) -> None:
    """GGUF bytes -> ``out`` (packed_bytes,), 64-byte aligned."""
    check(lib.azq_pack(type_id, _bytes(data), n, k, _bytes(out), n_threads), "pack")


def unpack(type_id: int, packed: Bytes, n: int, k: int, n_threads: int) -> Bytes:
    """The GGUF bytes, made back from the packed form."""
    out = np.empty(n * lib.azq_row_bytes(type_id, k), dtype=np.uint8)
    check(lib.azq_unpack(type_id, _bytes(packed), n, k, _bytes(out), n_threads), "unpack")
    return out


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
    """x (m, k) -> y (m, n), float32, contiguous, plus the bias (n,) unless that is 0.

    ``packed``, ``bias``, ``x`` and ``y`` are addresses: a tensor's is had sooner than an array over it.
    """
    cast = ffi.cast
    status = lib.azq_matmul_packed(
        type_id,
        cast("void *", packed),
        n,
        k,
        cast("float *", bias),
        cast("float *", x),
        m,
        cast("float *", y),
        COMPUTE[compute],
        n_threads,
    )
    if status != lib.AZQ_OK:
        raise_status(status, "matmul")


def packed_rows(
    type_id: int, packed: Bytes, n: int, k: int, rows: npt.NDArray[np.int64], out: Floats, n_threads: int
) -> None:
    """Rows of packed weights, dequantized into ``out`` (len(rows), k)."""
    indices = ffi.from_buffer("int64_t[]", rows)
    status = lib.azq_packed_rows(type_id, _bytes(packed), n, k, indices, len(rows), _floats(out), n_threads)
    check(status, "rows of packed weights")


# ---- programs ----------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of ``n_seq`` sequences of ``n_ctx`` positions; ``dtype`` is f32, f16 or q8_0."""

    def __init__(
        self, n_layer: int, n_seq: int, n_ctx: int, n_head_kv: int, head_dim: int, dtype: str
    ) -> None:
        type_id = {"f32": lib.AZQ_TYPE_F32, "f16": lib.AZQ_TYPE_F16, "q8_0": lib.AZQ_TYPE_Q8_0}[dtype]
        handle = ffi.new("azq_kv **")
        what = f"KV cache of {n_layer} layers, {n_seq} x {n_ctx} positions, {n_head_kv} x {head_dim} values"
        check(lib.azq_kv_create(n_layer, n_seq, n_ctx, n_head_kv, head_dim, type_id, handle), what)
        self.n_seq, self.n_ctx = n_seq, n_ctx
        self.handle = ffi.gc(handle[0], lib.azq_kv_free)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return int(lib.azq_kv_bytes(self.handle))

    def copy(self, source: int, target: int, n: int) -> None:
        """Copies the first ``n`` positions of one sequence into another."""
        check(lib.azq_kv_copy(self.handle, source, target, n), "copy of a KV cache sequence")


class Program:
    """A program for the C executor. Steps from several Python threads run one after another."""

    def __init__(self, spec: ProgramSpec[Matrix]) -> None:
        self._spec = spec  # keeps matrices and vectors alive
        self._lock = threading.Lock()
        self.n_vocab = spec.n_vocab
        self._kept: list[Any] = []  # arrays that the C side points to
        ops = ffi.new("azq_op[]", len(spec.ops))
        for target, op in zip(ops, spec.ops, strict=True):
            self._fill(target, op)
        buffers = ffi.new("azq_buffer[]", [{"width": b.width, "outputs": b.outputs} for b in spec.buffers])
        handle = ffi.new("azq_program **")
        check(lib.azq_program_create(ops, len(spec.ops), buffers, len(spec.buffers), handle), "program")
        self._handle = ffi.gc(handle[0], lib.azq_program_free)
        self._seconds: npt.NDArray[np.float64] | None = None

    def measure(self, seconds: npt.NDArray[np.float64] | None) -> None:
        """From now on every step adds to ``seconds`` (ops,) what each op took; ``None`` ends it."""
        with self._lock:
            pointer = ffi.NULL if seconds is None else ffi.from_buffer("double[]", seconds)
            check(lib.azq_program_measure(self._handle, pointer), "measuring a program")
            self._seconds = seconds  # kept alive

    def _fill(self, target: Any, op: Op[Matrix]) -> None:
        target.kind = KINDS[op.kind]
        target.width = op.width
        for name in ("out", "a", "b", "work"):
            ref = getattr(op, name)
            setattr(target, name, -1 if ref is None else ref.buffer)
            if name != "work":
                setattr(target, f"{name}_col", 0 if ref is None else ref.col)
        for name in (
            "layer",
            "n_head",
            "n_head_kv",
            "head_dim",
            "n_rot",
            "window",
            "eps",
            "scale",
            "softcap",
            "n_used",
        ):
            setattr(target, name, getattr(op, name))
        target.rope_mode = lib.AZQ_ROPE_NEOX if op.rope_neox else lib.AZQ_ROPE_NORM
        target.activation = ACTIVATIONS[op.activation]
        for name in ("w", "w2"):
            matrix = getattr(op, name)
            setattr(target, name, ffi.NULL if matrix is None else matrix.handle)
        target.n_expert = len(op.experts)
        if op.experts:
            handles = [matrix.handle for expert in op.experts for matrix in expert]
            self._kept.append(ffi.new("azq_matrix *[]", handles))
            target.experts = self._kept[-1]
        for name in ("vec0", "vec1"):
            vector = getattr(op, name)
            setattr(target, name, ffi.NULL if vector is None else _floats(vector))

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
        logits = np.empty((len(o), self.n_vocab), dtype=np.float32)
        as_ints = [ffi.from_buffer("int32_t[]", v) for v in (t, s, p, o)]
        with self._lock:
            status = lib.azq_program_step(
                self._handle,
                kv.handle,
                COMPUTE[compute],
                len(t),
                *as_ints[:3],
                len(o),
                as_ints[3],
                _floats(logits),
            )
        check(status, f"step of {len(t)} tokens")
        return logits

    def run(
        self, kv: KVCache, compute: str, arrays: StepArrays, n_tokens: int, n_out: int, *, choose: bool
    ) -> None:
        """One step over the first ``n_tokens`` tokens and ``n_out`` outputs of ``arrays``."""
        if arrays.pointers is None:
            ints = (arrays.tokens, arrays.sequence, arrays.position, arrays.out_rows, arrays.likeliest)
            arrays.pointers = (*(ffi.from_buffer("int32_t[]", v) for v in ints), _floats(arrays.numbers))
        t, s, p, o, likeliest, logits = arrays.pointers
        with self._lock:
            status = lib.azq_program_step(
                self._handle, kv.handle, COMPUTE[compute], n_tokens, t, s, p, n_out, o, logits
            )
        check(status, f"step of {n_tokens} tokens")
        if choose:
            check(lib.azq_likeliest(logits, n_out, self.n_vocab, likeliest), "choice of the likeliest tokens")
