"""Programs: the C executor against the NumPy one, and against itself in every way of cutting the work up."""

from __future__ import annotations

import dataclasses
import itertools
import time
from array import array
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import azquant as aq
from azquant import _fallback
from azquant.errors import AzquantError, InternalError, ShapeError
from azquant.program import ProgramBuilder, ProgramSpec, Ref, StepArrays
from azquant.types import get_type

native = pytest.importorskip("azquant._native", reason="the C extension is not built")

VOCAB, WIDTH, HEADS, KV_HEADS, DIM, FFN, CONTEXT = 61, 64, 4, 2, 16, 96, 48
QKV = (HEADS + 2 * KV_HEADS) * DIM

Floats = npt.NDArray[np.float32]
Build = Callable[[ModuleType], ProgramSpec[Any]]


class Weights:
    """Random weights, the same for both backends."""

    def __init__(self, module: ModuleType, seed: int = 0) -> None:
        self.module, self.random = module, np.random.default_rng(seed)

    def matrix(self, type: str, n: int, k: int, size: float = 0.2) -> Any:
        kind = get_type(type)
        w = (self.random.normal(size=(n, k)) * size).astype(np.float32)
        return self.module.Matrix(kind.id, _fallback.quantize(kind.id, w), n, k)

    def vector(self, n: int, centre: float = 0.0) -> Floats:
        return (centre + self.random.normal(size=n) * 0.1).astype(np.float32)


def frequencies(n: int, base: float = 100.0) -> Floats:
    return (base ** (-2.0 * np.arange(n) / (2 * n))).astype(np.float32)


def llama_like(module: ModuleType) -> ProgramSpec[Any]:
    """RMS norms, rotary positions, grouped queries, a gated feed-forward; gate and up share one buffer."""
    w, b = Weights(module), ProgramBuilder[Any]()
    x, normed, qkv, mixed = b.buffer(WIDTH), b.buffer(WIDTH), b.buffer(QKV), b.buffer(WIDTH)
    gate_up, hidden = b.buffer(2 * FFN), b.buffer(FFN)
    last, logits = b.buffer(WIDTH, outputs=True), b.buffer(VOCAB, outputs=True)
    b.embed(x, w.matrix("q8_0", VOCAB, WIDTH, 1.0), scale=1.5)
    theta = frequencies(DIM // 2)
    for layer, neox in enumerate((False, True)):
        b.rms_norm(normed, x, w.vector(WIDTH, 1.0), 1e-5)
        b.linear(qkv, normed, w.matrix("q4_0", QKV, WIDTH))
        b.rope(qkv, HEADS, DIM, theta, neox=neox)
        b.rope(qkv.at(HEADS * DIM), KV_HEADS, DIM, theta, neox=neox)
        b.attention(mixed, qkv, layer, HEADS, KV_HEADS, DIM, DIM**-0.5)
        b.linear(x, mixed, w.matrix("q4_0", WIDTH, WIDTH), residual=x)
        b.rms_norm(normed, x, w.vector(WIDTH, 1.0), 1e-6)
        b.linear(gate_up, normed, w.matrix("q4_0", FFN, WIDTH))
        b.linear(gate_up.at(FFN), normed, w.matrix("f16", FFN, WIDTH))
        b.glu(hidden, gate_up, gate_up.at(FFN), FFN, ("silu", "gelu_tanh")[layer])
        b.linear(x, hidden, w.matrix("q8_0", WIDTH, FFN), residual=x)
    b.select(last, x, WIDTH)
    b.rms_norm(last, last, w.vector(WIDTH, 1.0), 1e-5)
    b.linear(logits, last, w.matrix("q8_0", VOCAB, WIDTH))
    return b.build(n_layer=2, n_head_kv=KV_HEADS, head_dim=DIM)


def gpt_like(module: ModuleType) -> ProgramSpec[Any]:
    """Learned positions, layer norms with and without bias, biases, each activation, no shared heads."""
    w, b = Weights(module, 1), ProgramBuilder[Any]()
    x, normed, qkv, mixed = b.buffer(WIDTH), b.buffer(WIDTH), b.buffer(3 * WIDTH), b.buffer(WIDTH)
    hidden, last = b.buffer(FFN), b.buffer(WIDTH, outputs=True)
    logits = b.buffer(VOCAB, outputs=True)
    b.embed(x, w.matrix("f16", VOCAB, WIDTH, 1.0), w.matrix("f32", CONTEXT, WIDTH))
    for layer, activation in enumerate(("gelu_tanh", "gelu_erf", "silu", "relu")):
        b.layer_norm(normed, x, w.vector(WIDTH, 1.0), w.vector(WIDTH) if layer % 2 else None, 1e-5)
        b.linear(qkv, normed, w.matrix("bf16" if layer else "f32", 3 * WIDTH, WIDTH), w.vector(3 * WIDTH))
        b.attention(mixed, qkv, layer, HEADS, HEADS, DIM, 0.3)
        b.linear(x, mixed, w.matrix("q4_0", WIDTH, WIDTH), w.vector(WIDTH), residual=x)
        b.layer_norm(normed, x, w.vector(WIDTH, 1.0), w.vector(WIDTH), 1e-5)
        b.linear(hidden, normed, w.matrix("q4_0", FFN, WIDTH), w.vector(FFN), activation=activation)
        b.linear(x, hidden, w.matrix("q4_0", WIDTH, FFN), w.vector(WIDTH), residual=x)
    b.layer_norm(x, x, w.vector(WIDTH, 1.0), w.vector(WIDTH), 1e-5)
    b.select(last, x, WIDTH)
    b.linear(logits, last, w.matrix("q4_0", VOCAB, WIDTH), w.vector(VOCAB))
    return b.build(n_layer=4, n_head_kv=HEADS, head_dim=DIM)


def gemma_like(module: ModuleType) -> ProgramSpec[Any]:
    """Norms of each head, windows, soft-caps, scaled sums; queries of 5 heads to one, an odd head width."""
    heads, dim, window = 5, 12, 6
    w, b = Weights(module, 3), ProgramBuilder[Any]()
    x, qkv, mixed = b.buffer(WIDTH), b.buffer((heads + 2) * dim), b.buffer(heads * dim)
    update, last = b.buffer(WIDTH), b.buffer(WIDTH, outputs=True)
    raw, logits = b.buffer(VOCAB, outputs=True), b.buffer(VOCAB, outputs=True)
    b.embed(x, w.matrix("q8_0", VOCAB, WIDTH, 1.0))
    for layer in range(4):
        b.linear(qkv, x, w.matrix("q4_0", (heads + 2) * dim, WIDTH))
        b.rms_norm(qkv, qkv, w.vector(dim, 1.0), 1e-6, n_head=heads)
        b.rms_norm(qkv.at(heads * dim), qkv.at(heads * dim), w.vector(dim, 1.0), 1e-6, n_head=1)
        b.rope(qkv, heads, dim, frequencies(dim // 2), neox=True, scale=0.8)
        b.rope(qkv.at(heads * dim), 1, dim, frequencies(dim // 2), neox=True)
        seen = (window, 1, 2, 0)[layer]
        b.attention(mixed, qkv, layer, heads, 1, dim, 0.4, window=seen, softcap=(0.0, 3.0)[layer % 2])
        b.linear(update, mixed, w.matrix("f16", WIDTH, heads * dim))
        b.add(x, update, x, WIDTH, scale=0.7)
    b.layer_norm(x, x, w.vector(WIDTH // 2, 1.0), w.vector(WIDTH // 2), 1e-5)
    b.ops[-1] = dataclasses.replace(b.ops[-1], width=WIDTH, n_head=2)
    b.select(last, x, WIDTH)
    b.linear(raw, last, w.matrix("q8_0", VOCAB, WIDTH))
    b.softcap(logits, raw, VOCAB, 2.5)
    return b.build(n_layer=4, n_head_kv=1, head_dim=dim)


def partly_rotated(module: ModuleType) -> ProgramSpec[Any]:
    """Ropes over part of a head, with one array of frequencies for different scales and lengths; columns."""
    w, b = Weights(module, 2), ProgramBuilder[Any]()
    x, qkv, mixed = b.buffer(WIDTH), b.buffer(8 + QKV), b.buffer(WIDTH + 4)
    last, logits = b.buffer(WIDTH, outputs=True), b.buffer(VOCAB, outputs=True)
    theta = frequencies(DIM // 2)
    b.embed(x, w.matrix("f32", VOCAB, WIDTH, 1.0))
    b.linear(qkv.at(8), x, w.matrix("f32", QKV, WIDTH))
    b.rope(qkv.at(8), HEADS, DIM, theta)
    b.rope(qkv.at(8 + HEADS * DIM), KV_HEADS, DIM, theta)
    b.ops[-2] = dataclasses.replace(b.ops[-2], scale=0.5)
    b.ops[-1] = dataclasses.replace(b.ops[-1], n_rot=DIM // 2, vec0=theta)
    b.rope(qkv.at(8), HEADS, DIM, frequencies(3, 50.0), neox=True)
    b.attention(mixed.at(4), qkv.at(8), 0, HEADS, KV_HEADS, DIM, 0.25)
    b.linear(x, mixed.at(4), w.matrix("f16", WIDTH, WIDTH), residual=x)
    b.select(last, x, WIDTH)
    b.linear(logits, last, w.matrix("f32", VOCAB, WIDTH))
    return b.build(n_layer=1, n_head_kv=KV_HEADS, head_dim=DIM)


def mixture_like(module: ModuleType) -> ProgramSpec[Any]:
    """Two layers of experts, of several types and numbers, the second wider inside; no last panel is full."""
    w, b = Weights(module, 3), ProgramBuilder[Any]()
    x, normed, qkv, mixed = b.buffer(WIDTH), b.buffer(WIDTH + 8), b.buffer(QKV), b.buffer(WIDTH)
    last, logits = b.buffer(WIDTH, outputs=True), b.buffer(VOCAB, outputs=True)
    b.embed(x, w.matrix("f16", VOCAB, WIDTH, 1.0))
    for layer, (n_expert, n_used, inner, types) in enumerate(
        ((5, 2, FFN, ("q4_0", "q4_0", "q8_0")), (9, 4, 2 * WIDTH + 8, ("q4_1", "f16", "f32")))
    ):
        b.rms_norm(normed, x, w.vector(WIDTH, 1.0), 1e-5)
        b.linear(qkv, normed, w.matrix("f32", QKV, WIDTH))
        b.rope(qkv, HEADS + KV_HEADS, DIM, frequencies(DIM // 2))
        b.attention(mixed, qkv, layer, HEADS, KV_HEADS, DIM, DIM**-0.5)
        b.linear(x, mixed, w.matrix("f32", WIDTH, WIDTH), residual=x)
        b.rms_norm(normed.at(8), x, w.vector(WIDTH, 1.0), 1e-5)
        shapes = ((inner, WIDTH), (inner, WIDTH), (WIDTH, inner))
        experts = [
            tuple(w.matrix(type, n, k, 0.3) for type, (n, k) in zip(types, shapes, strict=True))
            for _ in range(n_expert)
        ]
        router = w.matrix("f32", n_expert, WIDTH)
        b.experts(x, normed.at(8), router, experts, n_used, ("silu", "gelu_tanh")[layer], residual=x)
    b.select(last, x, WIDTH)
    b.linear(logits, last, w.matrix("f32", VOCAB, WIDTH))
    return b.build(n_layer=2, n_head_kv=KV_HEADS, head_dim=DIM)


BUILDERS = [llama_like, gpt_like, gemma_like, partly_rotated, mixture_like]
FIX_NUMPY = {"rope": lambda op: dataclasses.replace(op, vec0=op.vec0[: op.n_rot // 2])}


def numpy_spec(build: Build) -> ProgramSpec[Any]:
    """The program for NumPy. Frequencies past n_rot, which C ignores, are cut off."""
    spec = build(_fallback)
    return dataclasses.replace(spec, ops=tuple(FIX_NUMPY.get(op.kind, lambda op: op)(op) for op in spec.ops))


def cache(module: ModuleType, spec: ProgramSpec[Any], kv_type: str, n_seq: int = 4) -> Any:
    return module.KVCache(spec.n_layer, n_seq, CONTEXT, spec.n_head_kv, spec.head_dim, kv_type)


def tokens_of(sequence: int, n: int) -> list[int]:
    return [(7 * i * i + 3 * sequence + i) % VOCAB for i in range(n)]


RAGGED = [  # steps of (sequence, first position, tokens): prefill, decode and both at once
    [(0, 0, 5)],
    [(0, 5, 1), (2, 0, 7)],
    [(2, 7, 1), (0, 6, 1), (1, 0, 1)],
    [(1, 1, 19), (3, 0, 2)],
    [(0, 7, 1), (1, 20, 1), (2, 8, 1), (3, 2, 1)],
]


def run_ragged(module: ModuleType, spec: ProgramSpec[Any], compute: str, kv_type: str) -> list[Floats]:
    program, kv = module.Program(spec), cache(module, spec, kv_type)
    results = []
    for step in RAGGED:
        tokens = [t for s, first, n in step for t in tokens_of(s, first + n)[first:]]
        sequence = [s for s, _, n in step for _ in range(n)]
        position = [first + i for _, first, n in step for i in range(n)]
        out = list(range(len(tokens)))[::-1]  # every row, in another order
        results.append(program.step(kv, compute, tokens, sequence, position, out))
    return results


# ---- C against NumPy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("compute", ["fp32", "int8", "bf16", "auto"])
def test_c_and_numpy_agree(c_isa: str, build: Build, kv_type: str, compute: str) -> None:
    got = run_ragged(native, build(native), compute, kv_type)
    expected = run_ragged(_fallback, numpy_spec(build), compute, kv_type)
    # In fp32 only rounding differs. With int8 or narrower keys a last digit may tip a rounding to 8 or 16
    # bits. With auto a product that NumPy computes in int8 may be computed in bf16.
    bound = {"f32": 2e-5, "f16": 2e-3, "q8_0": 2e-2}[kv_type] if compute == "fp32" else 2e-2
    bound = 5e-2 if compute == "auto" else bound
    for c, n in zip(got, expected, strict=True):
        assert c.shape == n.shape
        assert np.linalg.norm(c - n) / np.linalg.norm(n) <= bound


def test_numpy_runs_what_the_c_executor_ignores() -> None:
    """The test above cuts frequencies for NumPy; here is that the cut is of no consequence in C."""
    spec = partly_rotated(native)
    cut = dataclasses.replace(spec, ops=tuple(FIX_NUMPY.get(op.kind, lambda op: op)(op) for op in spec.ops))
    whole, part = (run_ragged(native, s, "fp32", "f32") for s in (spec, cut))
    assert all(np.array_equal(a, b) for a, b in zip(whole, part, strict=True))


# ---- equal bits --------------------------------------------------------------------------------------

TOKENS = 37


def prefill(spec: ProgramSpec[Any], compute: str, kv_type: str, chunks: list[int], *, crowd: bool) -> Floats:
    """Logits (TOKENS, VOCAB) of sequence 1; with ``crowd``, other sequences' tokens in every step."""
    program, kv = native.Program(spec), cache(native, spec, kv_type)
    tokens, done, results = tokens_of(1, TOKENS), 0, []
    for n in chunks:
        batch = [(t, 1, done + i) for i, t in enumerate(tokens[done : done + n])]
        if crowd:
            others = [(tokens_of(s, TOKENS)[done], s, done) for s in (0, 3)]
            batch = [others[0], *batch, others[1]]
        t, s, p = zip(*batch, strict=True)
        rows = [i for i, sequence in enumerate(s) if sequence == 1]
        results.append(program.step(kv, compute, t, s, p, rows))
        done += n
    assert done == TOKENS
    return np.concatenate(results)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("compute", ["fp32", "int8", "bf16"])
def test_bits_do_not_depend_on_threads_chunks_or_company(
    c_isa: str, build: Build, kv_type: str, compute: str
) -> None:
    spec = build(native)
    if compute != "bf16" or c_isa not in ("avx512bf16", "amx"):  # whose bf16 has an order of its own
        aq.use_isa("scalar")
    aq.set_num_threads(1)
    expected = prefill(spec, compute, kv_type, [TOKENS], crowd=False)
    aq.use_isa(c_isa)
    ways = itertools.product([[TOKENS], [1] * TOKENS, [8, 8, 8, 8, 5], [20, 1, 16]], [False, True])
    for (chunks, crowd), threads in zip(ways, [1, 2, 3, 4, 4, 3, 2, 1], strict=True):
        aq.set_num_threads(threads)
        got = prefill(spec, compute, kv_type, chunks, crowd=crowd)
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), (threads, chunks, crowd)


def test_one_program_serves_growing_steps_and_caches(c_isa: str) -> None:
    """Buffers grow with the step, scratch with the cache's length; old results must not shine through."""
    spec = llama_like(native)
    program = native.Program(spec)
    for n_ctx, n in ((4, 3), (CONTEXT, 40), (8, 2), (CONTEXT, 41)):
        kv = native.KVCache(spec.n_layer, 1, n_ctx, spec.n_head_kv, spec.head_dim, "f32")
        fresh_kv = native.KVCache(spec.n_layer, 1, n_ctx, spec.n_head_kv, spec.head_dim, "f32")
        arguments = ("int8", tokens_of(0, n), [0] * n, range(n), [n - 1])
        fresh = native.Program(spec).step(fresh_kv, *arguments)
        assert np.array_equal(program.step(kv, *arguments), fresh)


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_a_copied_sequence_continues_like_its_source(module: ModuleType, kv_type: str) -> None:
    spec = llama_like(module) if module is native else numpy_spec(llama_like)
    program, kv = module.Program(spec), cache(module, spec, kv_type)
    size = {"f32": 4 * DIM, "f16": 2 * DIM, "q8_0": 34 * -(-DIM // 32)}[kv_type]
    assert kv.nbytes == 2 * 2 * 4 * CONTEXT * KV_HEADS * size  # CONTEXT is whole tiles of C's keys
    program.step(kv, "fp32", tokens_of(0, 9), [0] * 9, range(9), [])
    kv.copy(0, 2, 9)
    kv.copy(0, 0, 9)
    both = program.step(kv, "fp32", [5, 5], [0, 2], [9, 9], [0, 1])
    assert np.array_equal(both[0], both[1])
    kv.copy(0, 3, 4)  # a prefix only: the rest of sequence 3 is computed anew
    whole = program.step(kv, "fp32", tokens_of(0, 9)[4:], [3] * 5, range(4, 9), [4])
    again = program.step(kv, "fp32", tokens_of(0, 9)[8:], [0], [8], [0])
    assert np.allclose(whole, again, rtol=1e-4, atol=1e-5)


def test_a_q8_0_cache_is_close_to_f32(c_isa: str) -> None:
    """8 bits per number, whatever the heads' size. Four random layers make 0.4% of an error 1.3%.

    With experts there is no such bound: of two rated nearly alike, an error may choose the other.
    """
    for build in BUILDERS:
        if build is mixture_like:
            continue
        exact, rounded = (run_ragged(native, build(native), "fp32", kv_type) for kv_type in ("f32", "q8_0"))
        for e, r in zip(exact, rounded, strict=True):
            assert 0 < np.linalg.norm(e - r) / np.linalg.norm(e) < 0.02


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_a_q8_0_cache_hides_no_nan(module: ModuleType) -> None:
    """Quantizing must not turn what is no number into one."""

    def f32(values: Floats) -> Any:
        data = np.ascontiguousarray(values, np.float32)
        return module.Matrix(get_type("f32").id, data.view(np.uint8).reshape(-1), *data.shape)

    b = ProgramBuilder[Any]()
    x, qkv, mixed, out = b.buffer(32), b.buffer(96), b.buffer(32), b.buffer(32, outputs=True)
    table = np.ones((2, 32))
    table[1, 5] = np.nan
    b.embed(x, f32(table))
    b.linear(qkv, x, f32(np.vstack([np.eye(32)] * 3)))
    b.attention(mixed, qkv, 0, 1, 1, 32, 1.0)
    b.select(out, mixed, 32)
    spec = b.build(n_layer=1, n_head_kv=1, head_dim=32)
    for tokens, finite in (([0, 0], True), ([1, 0], False)):
        kv = module.KVCache(1, 1, 4, 1, 32, "q8_0")
        logits = module.Program(spec).step(kv, "fp32", tokens, [0, 0], [0, 1], [1])
        assert np.isfinite(logits).all() if finite else np.isnan(logits).all()


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
@pytest.mark.parametrize("n", [0, 1, 4, 15, 16, 17, 30])
def test_a_copy_leaves_later_positions_alone(module: ModuleType, n: int) -> None:
    spec = llama_like(module)
    program, kv = module.Program(spec), cache(module, spec, "f32")
    first, other = tokens_of(0, n), tokens_of(1, 33)
    if n:
        program.step(kv, "fp32", first, [0] * n, range(n), [])
    program.step(kv, "fp32", other, [1] * 33, range(33), [])
    kv.copy(0, 1, n)
    got = program.step(kv, "fp32", [2], [1], [33], [0])
    # The same by hand: the later positions are those of the other beginning, the first ones are overwritten.
    fresh = cache(module, spec, "f32")
    program.step(fresh, "fp32", other, [2] * 33, range(33), [])
    if n:
        program.step(fresh, "fp32", first, [2] * n, range(n), [])
    expected = program.step(fresh, "fp32", [2], [2], [33], [0])
    assert np.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert (n == 0) == np.allclose(
        got, program.step(kv_of(module, program, other), "fp32", [2], [0], [33], [0])
    )


def kv_of(module: ModuleType, program: Any, tokens: list[int]) -> Any:
    """A cache whose sequence 0 holds ``tokens``."""
    kv = module.KVCache(2, 1, CONTEXT, KV_HEADS, DIM, "f32")
    program.step(kv, "fp32", tokens, [0] * len(tokens), range(len(tokens)), [])
    return kv


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_steps_without_tokens_or_logits(module: ModuleType) -> None:
    spec = llama_like(module)
    program, kv = module.Program(spec), cache(module, spec, "f32")
    assert program.step(kv, "auto", [], [], [], []).shape == (0, VOCAB)
    assert program.step(kv, "auto", [1, 2], [0, 0], [0, 1], []).shape == (0, VOCAB)
    twice = program.step(kv, "auto", [3], [0], [2], [0, 0])
    assert twice.shape == (2, VOCAB)
    assert np.array_equal(twice[0], twice[1])


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_a_nan_stays_in_its_own_sequence(module: ModuleType) -> None:
    spec = gpt_like(module)
    program, kv = module.Program(spec), cache(module, spec, "f32")
    clean = program.step(kv, "int8", tokens_of(0, 4), [0] * 4, range(4), range(4))
    spoiled = module.Matrix(0, np.full(VOCAB * WIDTH, np.nan, np.float32).view(np.uint8), VOCAB, WIDTH)
    ops = (dataclasses.replace(spec.ops[0], w=spoiled), *spec.ops[1:])
    bad = module.Program(dataclasses.replace(spec, ops=ops))
    assert np.isnan(bad.step(kv, "int8", [1], [1], [0], [0])).all()
    again = program.step(kv, "int8", tokens_of(0, 4)[3:], [0], [3], [0])
    assert np.allclose(again[0], clean[3], rtol=1e-2, atol=1e-2)


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
@pytest.mark.parametrize(
    ("tokens", "sequence", "position", "rows"),
    [
        ([VOCAB], [0], [0], [0]),
        ([-1], [0], [0], [0]),
        ([1], [4], [0], [0]),
        ([1], [-1], [0], [0]),
        ([1], [0], [CONTEXT], [0]),
        ([1], [0], [-1], [0]),
        ([1], [0], [0], [1]),
        ([1], [0], [0], [-1]),
        ([1, VOCAB], [0, 0], [0, 1], [0]),
    ],
)
def test_indices_out_of_range(
    module: ModuleType, tokens: list[int], sequence: list[int], position: list[int], rows: list[int]
) -> None:
    spec = gpt_like(module)
    program, kv = module.Program(spec), cache(module, spec, "f32")
    with pytest.raises(ShapeError, match="step of"):
        program.step(kv, "auto", tokens, sequence, position, rows)


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_lists_of_different_lengths(module: ModuleType) -> None:
    spec = gpt_like(module)
    program, kv = module.Program(spec), cache(module, spec, "f32")
    for lists in (([1, 2], [0], [0, 1]), ([1, 2], [0, 0], [0]), ([1], [0, 0], [0])):
        with pytest.raises(AzquantError):
            program.step(kv, "auto", *lists, [0])


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_the_cache_of_another_model(module: ModuleType) -> None:
    spec = llama_like(module)
    program = module.Program(spec)
    for layers, heads, dim in ((1, KV_HEADS, DIM), (2, KV_HEADS + 1, DIM), (2, KV_HEADS, DIM + 2)):
        kv = module.KVCache(layers, 1, CONTEXT, heads, dim, "f32")
        with pytest.raises(ShapeError):
            program.step(kv, "auto", [1], [0], [0], [0])


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_caches_that_cannot_be(module: ModuleType) -> None:
    for shape in ((0, 1, 8, 1, 4), (1, 1, -1, 1, 4)):
        with pytest.raises(ShapeError):
            module.KVCache(*shape, "f32")
    kv = module.KVCache(1, 2, 8, 1, 4, "f32")
    for arguments in ((2, 0, 1), (0, 2, 1), (-1, 0, 1), (0, 1, 9), (0, 1, -1)):
        with pytest.raises(ShapeError):
            kv.copy(*arguments)


def change(index: int, **fields: Any) -> Build:
    """gpt_like with one op changed."""

    def build(module: ModuleType) -> ProgramSpec[Any]:
        spec = gpt_like(module)
        ops = list(spec.ops)
        ops[index] = dataclasses.replace(ops[index], **fields)
        return dataclasses.replace(spec, ops=tuple(ops))

    return build


@pytest.mark.parametrize(
    "build",
    [
        change(0, width=WIDTH - 1),
        change(0, out=Ref(99)),
        change(0, out=Ref(0, 1)),
        change(0, w=None),
        change(1, vec0=None),
        change(1, a=Ref(0, 1)),
        change(1, a=Ref(5)),
        change(2, a=Ref(2)),
        change(2, width=7),
        change(3, n_head=0),
        change(3, n_head_kv=3),
        change(3, layer=-1),
        change(3, head_dim=1 << 20),
        change(3, window=-1),
        change(3, softcap=-1.0),
        change(3, softcap=float("nan")),
        change(1, n_head=-1),
        change(1, n_head=7),
        change(-2, out=Ref(0)),
        change(-1, out=Ref(1)),
    ],
)
def test_programs_that_contradict_themselves(build: Build) -> None:
    with pytest.raises(InternalError, match="AZQ_E_PROGRAM"):
        native.Program(build(native))


def test_an_op_may_not_read_neighbours_of_what_it_writes() -> None:
    def shifted(kind: str) -> ProgramSpec[Any]:
        w, b = Weights(native), ProgramBuilder[Any]()
        x, last = b.buffer(2 * WIDTH), b.buffer(WIDTH, outputs=True)
        b.embed(x, w.matrix("f32", VOCAB, WIDTH))
        if kind == "norm":
            b.rms_norm(x.at(1), x, w.vector(WIDTH), 1e-5)
        elif kind == "glu":
            b.glu(x, x.at(WIDTH), x, WIDTH, "silu")
        elif kind == "add":
            b.add(x.at(1), x, x, WIDTH)
        elif kind == "softcap":
            b.softcap(x.at(2), x, WIDTH, 1.0)
        else:
            other = b.buffer(WIDTH)
            b.linear(x, other, w.matrix("f32", WIDTH, WIDTH), residual=x.at(1))
        b.select(last, x, WIDTH)
        return b.build(n_layer=1, n_head_kv=1, head_dim=4)

    for kind in ("norm", "glu", "residual", "add", "softcap"):
        with pytest.raises(InternalError, match="AZQ_E_PROGRAM"):
            native.Program(shifted(kind))


# ---- steps over arrays that stay ------------------------------------------------------------------------


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_run_gives_what_step_gives(module: ModuleType) -> None:
    spec = llama_like(module) if module is native else numpy_spec(llama_like)
    program, arrays = module.Program(spec), StepArrays(VOCAB)
    caches = [
        module.KVCache(spec.n_layer, 2, CONTEXT, spec.n_head_kv, spec.head_dim, "f32") for _ in range(2)
    ]
    for first, n in ((0, 5), (5, 1), (6, 20)):  # arrays that are made, kept, and made larger
        tokens, positions, rows = tokens_of(0, first + n)[first:], range(first, first + n), [0, n - 1]
        arrays.reserve(n, 2)
        for held, values in (
            (arrays.tokens, tokens),
            (arrays.sequence, [1] * n),
            (arrays.position, positions),
        ):
            held[:n] = array("i", values)
        arrays.out_rows[:2] = array("i", rows)
        program.run(caches[0], "int8", arrays, n, 2, choose=True)
        expected = program.step(caches[1], "int8", tokens, [1] * n, positions, rows)
        assert np.array_equal(arrays.logits[:2], expected)
        assert arrays.likeliest[:2].tolist() == expected.argmax(axis=1).tolist()


def test_the_likeliest_is_the_first_of_equals_and_the_first_nan() -> None:
    chance = np.random.default_rng(0)
    for n in (1, 15, 16, 17, 100, 1000):
        x = np.round(chance.normal(size=(50, n)) * 2).astype(np.float32)
        x[chance.random(x.shape) < 0.02] = -np.inf
        x[10], x[11, n // 2] = -np.inf, np.inf
        x[20:30, n - 1] = x[25:30, n // 3] = np.nan
        found = np.zeros(len(x), np.int32)
        logits, ids = native.ffi.from_buffer("float[]", x), native.ffi.from_buffer("int32_t[]", found)
        assert native.lib.azq_likeliest(logits, len(x), n, ids) == 0
        assert found.tolist() == x.argmax(axis=1).tolist()
    before = native.lib.azq_threads()
    native.lib.azq_threads_set(3)
    for n in (30_000, 100_003):  # fewer rows than threads: in pieces
        for place in (0, 5, 1023, 1024, n // 2, n - 1):
            x = np.round(chance.normal(size=(2, n)) * 2).astype(np.float32)
            x[0, [place, n - 1]] = 100
            x[1, [place, n - 1]] = np.nan
            logits = native.ffi.from_buffer("float[]", x)
            assert native.lib.azq_likeliest(logits, len(x), n, ids) == 0
            assert found[: len(x)].tolist() == [place, place]
    native.lib.azq_threads_set(before)
    assert native.lib.azq_likeliest(native.ffi.NULL, 1, 5, native.ffi.NULL) != 0
    assert native.lib.azq_likeliest(logits, 1, 0, ids) != 0


@pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])
def test_a_measured_step_says_where_its_time_went(module: ModuleType) -> None:
    spec = llama_like(module) if module is native else numpy_spec(llama_like)
    program = module.Program(spec)
    kv = module.KVCache(spec.n_layer, 1, CONTEXT, spec.n_head_kv, spec.head_dim, "f32")
    seconds = np.zeros(len(spec.ops))
    program.measure(seconds)
    begin = time.perf_counter()
    program.step(kv, "int8", tokens_of(0, 9), [0] * 9, range(9), [8])
    assert 0 < seconds.sum() < time.perf_counter() - begin
    program.measure(None)
    before = seconds.copy()
    program.step(kv, "int8", tokens_of(0, 9), [0] * 9, range(9), [8])
    assert np.array_equal(seconds, before)
