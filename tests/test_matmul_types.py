"""Products with weights of every type: equal bits everywhere, bounds, packing and back, whole models."""

from __future__ import annotations

import itertools
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import azquant as aq
from azquant import _fallback
from azquant.program import ProgramBuilder, ProgramSpec
from azquant.types import TYPES, get_type

native = pytest.importorskip("azquant._native", reason="the C extension is not built")

INT8 = list(_fallback.INT8)
QUANTIZED = [name for name, row in TYPES.items() if row.can_quantize]
DECODED = [name for name, row in TYPES.items() if row.can_dequantize]
SCALES = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
SCALES |= {"q4_1": (0, 2), "q5_1": (0, 2), "mxfp4": ()}
"""Where a block has its fp16 numbers; at its beginning in the types that are not listed."""
MAX_PACKED = {"q4_k": 4.63, "q5_k": 5.63, "q3_k": 3.57, "iq4_xs": 4.32, "q6_k": 7.0}
"""Bits per weight of a large packed matrix; the file's where a type is not listed."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def random_blocks(name: str, n: int, k: int, seed: int = 0) -> aq.QTensor:
    """Any bytes, also those that no quantizer makes; but fp16 numbers and exponents are near one."""
    kind, random = TYPES[name], np.random.default_rng([seed, n, k])
    data = random.integers(0, 256, (n * k // kind.block_size, kind.block_bytes), dtype=np.uint8)
    for at in SCALES.get(name, (0,)):
        numbers = random.uniform(-1, 1, len(data)).astype(np.float16)
        data[:, at : at + 2] = numbers.reshape(-1, 1).view(np.uint8)
    if name == "mxfp4":
        data[:, 0] = random.integers(0, 3, len(data)) * random.integers(0, 60, len(data))
    return aq.QTensor(data.reshape(-1), (n, k), name)


def int8_bound(x: Floats, w: aq.QTensor) -> npt.NDArray[np.float64]:
    """What no element's error exceeds: half a step of each activation, and fp32 sums, minima apart."""
    exact_x, exact_w = np.abs(x.astype(np.float64)), np.abs(w.dequantize().astype(np.float64))
    amax = exact_x.reshape(len(x), -1, 32).max(axis=2)
    steps = (amax / 254) @ exact_w.reshape(len(exact_w), -1, 32).sum(axis=2).T
    largest = exact_w.reshape(len(exact_w), -1, 32).max(axis=2)
    return 1.001 * steps + 1e-4 * (32 * amax) @ largest.T


# ---- which types ---------------------------------------------------------------------------------------


def test_both_backends_name_the_same_int8_types() -> None:
    for kind in TYPES.values():
        assert bool(native.lib.azq_has_int8(kind.id)) == (kind.name in INT8), kind


@pytest.mark.parametrize("name", DECODED)
def test_every_type_that_can_be_read_can_be_multiplied_packed_and_looked_up(isa: str, name: str) -> None:
    kind = TYPES[name]
    k = 2 * max(256, kind.block_size)
    if name in INT8 or not kind.is_quantized:
        w = random_blocks(name, 19, k) if kind.is_quantized else aq.quantize(normal(19, k), name)
    else:
        random = np.random.default_rng(1)
        data = (
            random.integers(0, 256, 19 * kind.row_bytes(k), dtype=np.uint8) & 0xBB
        )  # no NaN among the scales
        w = aq.QTensor(data, (19, k), name)
    x = normal(3, k)
    expected = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
    y = aq.matmul(x, w)
    assert np.linalg.norm(y - expected) <= (0.02 if name in INT8 else 1e-5) * np.linalg.norm(expected)
    assert np.allclose(w.pack().dequantize(), w.dequantize(), equal_nan=True)


# ---- accuracy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("made", ["quantized", "random"])
def test_int8_error_is_within_the_bound(isa: str, name: str, made: str) -> None:
    w = random_blocks(name, 48, 768) if made == "random" else aq.quantize(normal(48, 768, seed=1), name)
    x = normal(11, 768)
    y = aq.matmul(x, w, "int8")
    exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
    assert (np.abs(y - exact) <= int8_bound(x, w)).all()
    if made == "quantized":
        assert np.linalg.norm(y - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", INT8)
def test_int8_is_what_the_numerics_contract_says(isa: str, name: str) -> None:
    """float64 sums of dequantized weights times activations rounded to d * RNE(x / d), d = amax / 127."""
    x, w = normal(5, 512), aq.quantize(normal(7, 512, seed=1), name)
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    rounded = np.rint(blocks * (np.float32(127) / amax)).astype(np.float64) * (amax / np.float32(127))
    expected = rounded.reshape(x.shape) @ w.dequantize().astype(np.float64).T
    assert np.allclose(aq.matmul(x, w, "int8"), expected, rtol=1e-5, atol=3e-5)


def test_activations_without_mean_are_as_exact_with_minima(isa: str) -> None:
    """A block of equal activations: all that a minimum adds is one product."""
    x = np.ones((2, 512), np.float32)
    for name in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k"):
        w = aq.quantize(normal(9, 512) + np.float32(2), name)
        exact = w.dequantize().astype(np.float64).sum(axis=1)
        assert np.allclose(aq.matmul(x, w, "int8"), exact, rtol=3e-6), name


# ---- equal bits ------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in INT8 if name not in ("q4_0", "q8_0")]),
    m=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 11, 64, 65, 70]),
    n=st.integers(1, 90),
    blocks=st.integers(1, 9),
    threads=st.integers(1, 4),
)
def test_bits_are_the_same_on_every_isa_and_for_every_thread_count(
    name: str, m: int, n: int, blocks: int, threads: int
) -> None:
    x, w = normal(m, TYPES[name].block_size * blocks), random_blocks(name, n, TYPES[name].block_size * blocks)
    if m > 2:
        x[m // 2, 3] = np.inf
    before, number = aq.active_isa(), aq.num_threads()
    try:
        aq.use_isa("scalar")
        aq.set_num_threads(1)
        expected = aq.matmul(x, w, "int8")
        assert np.isnan(expected[m // 2]).all() == (m > 2)
        for isa in aq.isas():
            aq.use_isa(isa)
            aq.set_num_threads(threads)
            assert np.array_equal(aq.matmul(x, w, "int8"), expected, equal_nan=True), isa
    finally:
        aq.use_isa(before)
        aq.set_num_threads(number)


@pytest.mark.parametrize("name", [*INT8, "f32", "f16", "bf16", "iq2_s"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(c_isa: str, name: str) -> None:
    k = 512
    if name == "iq2_s":
        data = np.random.default_rng(0).integers(0, 256, 37 * TYPES[name].row_bytes(k), dtype=np.uint8) & 0xBB
        w = aq.QTensor(data, (37, k), name)
    else:
        w = aq.quantize(normal(37, k, seed=1), name)
    x = normal(71, k)
    for compute in ("int8", "fp32") if name in INT8 else ("fp32",):  # auto may take bf16 for many rows
        batch = aq.matmul(x, w, compute)
        for size in (1, 2, 3, 5, 7, 25, 64, 70):
            assert np.array_equal(aq.matmul(x[71 - size :], w, compute), batch[71 - size :]), (size, compute)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once. The product is exact in float64; where the sum there is not, its last bit is
    made odd, so that rounding it again to float32 cannot tip the wrong way."""
    product, c64 = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c64
    other = total - product
    error = (product - (total - other)) + (c64 - other)
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    return odd.view(np.float64).astype(np.float32)


def lanes(x: Floats, w: Floats) -> Floats:
    """The fp32 product as it is defined: fused sums in 16 lanes, then the lanes are folded."""
    short = -x.shape[1] % 16
    x, w = (np.pad(a, ((0, 0), (0, short))) for a in (x, w))
    sums = np.zeros((len(x), len(w), 16), np.float32)
    for i in range(0, x.shape[1], 16):
        sums = fma(x[:, None, i : i + 16], w[None, :, i : i + 16], sums)
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q4_0", "q5_k", "tq1_0"])
@pytest.mark.parametrize("m", [1, 5, 24, 25, 60, 130])
def test_fp32_is_what_its_definition_says(c_isa: str, name: str, m: int) -> None:
    for n, k in ((33, 1280), (35, 77)):
        k += -k % TYPES[name].block_size
        x, w = normal(m, k), aq.quantize(normal(n, k, seed=1), name)
        assert np.array_equal(aq.matmul(x, w, "fp32"), lanes(x, w.dequantize()))


# ---- packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize(("n", "k"), [(1, 256), (17, 512), (32, 1280)])
def test_any_bytes_are_packed_and_come_back(c_isa: str, name: str, n: int, k: int) -> None:
    data = np.random.default_rng([n, k]).integers(0, 256, n * TYPES[name].row_bytes(k), dtype=np.uint8)
    assert np.array_equal(aq.QTensor(data, (n, k), name).unpack(), data)


@pytest.mark.parametrize("name", INT8)
def test_the_packed_form_is_about_as_large_as_the_file(c_isa: str, name: str) -> None:
    w = random_blocks(name, 64, 4096).pack()
    assert w.packed_nbytes * 8 / (64 * 4096) <= MAX_PACKED.get(name, TYPES[name].bits_per_weight) + 1e-9


# ---- models ------------------------------------------------------------------------------------------------


@cache
def blocks_of(name: str, number: int, n: int, k: int, size: float) -> Bytes:
    return aq.quantize(normal(n, k, seed=number) * np.float32(size), name).data


def model(module: ModuleType, name: str) -> ProgramSpec[Any]:
    """Two layers, every matrix of one type."""
    kind, numbers = get_type(name), itertools.count()
    vocabulary, width, hidden, heads = 50, 256, 512, 4

    def matrix(n: int, k: int, size: float = 0.06) -> Any:
        return module.Matrix(kind.id, blocks_of(name, next(numbers), n, k, size), n, k)

    b = ProgramBuilder[Any]()
    x, normed, qkv, mixed = b.buffer(width), b.buffer(width), b.buffer(3 * width), b.buffer(width)
    gate, up = b.buffer(hidden), b.buffer(hidden)
    last, logits = b.buffer(width, outputs=True), b.buffer(vocabulary, outputs=True)
    b.embed(x, matrix(vocabulary, width, 1.0))
    ones = np.ones(width, np.float32)
    for layer in range(2):
        b.rms_norm(normed, x, ones, 1e-5)
        b.linear(qkv, normed, matrix(3 * width, width))
        b.attention(mixed, qkv, layer, heads, heads, width // heads, 0.125)
        b.linear(x, mixed, matrix(width, width), residual=x)
        b.rms_norm(normed, x, ones, 1e-5)
        b.linear(gate, normed, matrix(hidden, width))
        b.linear(up, normed, matrix(hidden, width))
        b.glu(gate, gate, up, hidden, "silu")
        b.linear(x, gate, matrix(width, hidden), residual=x)
    b.select(last, x, width)
    b.linear(logits, last, matrix(vocabulary, width))
    return b.build(n_layer=2, n_head_kv=heads, head_dim=width // heads)


@cache
def logits(module: ModuleType, name: str, compute: str, isa: str) -> Floats:
    """Of a prompt and one token after it; isa only tells results apart."""
    tokens = [(7 * i * i + i) % 50 for i in range(9)]
    program, kv = module.Program(model(module, name)), module.KVCache(2, 1, 16, 4, 64, "f32")
    first = program.step(kv, compute, tokens[:8], [0] * 8, range(8), range(8))
    return np.concatenate([first, program.step(kv, compute, tokens[8:], [0], [8], [0])])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_models_logits_agree_with_numpys(c_isa: str, name: str) -> None:
    for compute, bound in (("fp32", 2e-5), ("auto", 2e-2)):
        got, expected = logits(native, name, compute, c_isa), logits(_fallback, name, compute, "numpy")
        assert np.linalg.norm(got - expected) <= bound * np.linalg.norm(expected), compute
