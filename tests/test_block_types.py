"""Every ggml type on every backend: the bytes and values are those of ggml's reference functions."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import types_golden as golden
from hypothesis import given, settings
from hypothesis import strategies as st

import azquant as aq
from azquant import _fallback, _fallback_encode
from azquant.errors import ArgumentError, NonFiniteError, ShapeError, UnsupportedTypeError
from azquant.types import TYPES

GOLDEN: dict[str, dict[str, str]] = json.loads(golden.GOLDEN.read_text())
ISAS = aq.isas()


@pytest.fixture(scope="module", params=[*ISAS, "numpy"])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The C kernels under each ISA of this machine, and NumPy."""
    if request.param == "numpy":
        yield _fallback
        return
    from azquant import _native

    before = aq.active_isa()
    aq.use_isa(request.param)
    yield _native
    aq.use_isa(before)


def quantize(kernels: ModuleType, name: str, x: Any, importance: Any = None) -> Any:
    return kernels.quantize(TYPES[name].id, x, importance)


@pytest.mark.parametrize("how", golden.IMPORTANCES)
def test_quantized_bytes_are_ggmls(kernels: ModuleType, how: str) -> None:
    wrong = []
    for kind in golden.KINDS:
        x = golden.weights(kind)
        for name in golden.QUANTIZED:
            made = quantize(kernels, name, x, golden.IMPORTANCES[how])
            if golden.sha(made) != GOLDEN["quantized"][f"{name} {kind} {how}"]:
                wrong.append((name, kind))
    assert not wrong


def test_decoded_values_are_ggmls(kernels: ModuleType) -> None:
    wrong = []
    for name in golden.DECODED:
        size = 640 * TYPES[name].block_size
        values = kernels.dequantize(TYPES[name].id, golden.blocks(name), 1, size)
        if golden.sha(values) != GOLDEN["decoded"][name]:
            wrong.append(name)
    assert not wrong


def test_the_shared_golden_bytes(kernels: ModuleType, shared_data: Path) -> None:
    folder = shared_data / "golden-quants"
    x = np.fromfile(folder / "input_32x1024_f32.bin", "<f4").reshape(32, 1024)
    for name in golden.QUANTIZED:
        expected = np.fromfile(folder / f"{name.upper()}.q.bin", np.uint8)
        blocks = expected.reshape(-1, TYPES[name].block_bytes)
        # ggml writes an infinite scale or minimum where azquant refuses: there, both are given zeros.
        overflowed = np.zeros(len(blocks), bool)
        for at in _fallback_encode.SCALES_AT.get(name, ()):
            overflowed |= blocks[:, at + 1] & 0x7C == 0x7C
        mended = x.reshape(-1, TYPES[name].block_size).copy()
        if overflowed.any():
            with pytest.raises(NonFiniteError):
                quantize(kernels, name, x)
            mended[overflowed] = 0
        made = quantize(kernels, name, mended.reshape(x.shape)).reshape(blocks.shape)
        assert (made[~overflowed] == blocks[~overflowed]).all(), name


def test_the_shared_golden_values(kernels: ModuleType, shared_data: Path) -> None:
    folder = shared_data / "golden-quants"
    found = sorted(folder.glob("*.dq.f32.bin"))
    assert len(found) > 15
    for path in found:
        type_ = TYPES[path.name.split(".")[0].lower()]
        data = np.fromfile(folder / f"{type_.name.upper()}.q.bin", np.uint8)
        values = kernels.dequantize(type_.id, data, 32, 1024)
        expected = np.fromfile(path, "<f4").reshape(32, 1024)
        same = (values == expected) | (np.isnan(values) & np.isnan(expected))
        assert same.all(), path


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(golden.QUANTIZED[:-2]),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-45, 3),
    weighted=st.booleans(),
)
def test_every_backend_makes_the_same_bytes(name: str, seed: int, exponent: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 768)) * 10.0**exponent).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = rng.choice([0.0, -0.0])
    importance = rng.gamma(0.5, size=768).astype(np.float32) if weighted else None
    expected = _fallback.quantize(TYPES[name].id, x, importance)
    from azquant import _native

    before = aq.active_isa()
    try:
        for isa in ISAS:
            aq.use_isa(isa)
            assert (_native.quantize(TYPES[name].id, x, importance) == expected).all(), isa
    finally:
        aq.use_isa(before)


@pytest.mark.parametrize("name", golden.QUANTIZED)
def test_threads_and_row_count_do_not_show(name: str) -> None:
    x = np.concatenate([golden.weights("normal")] * 4)
    alone = aq.quantize(x[5:6], name, imatrix=golden.IMPORTANCES["imatrix"])
    before = aq.num_threads()
    try:
        for threads in (1, 3):
            aq.set_num_threads(threads)
            whole = aq.quantize(x, name, imatrix=golden.IMPORTANCES["imatrix"])
            row = whole.data.reshape(len(x), -1)[5]
            assert (row == alone.data).all()
    finally:
        aq.set_num_threads(before)


def test_the_exponent_of_mxfp4_is_glibcs_log2f_next_to_powers_of_two() -> None:
    try:
        libm = ctypes.CDLL("libm.so.6")
    except OSError:
        pytest.skip("this C library is not glibc")
    libm.log2f.restype, libm.log2f.argtypes = ctypes.c_float, [ctypes.c_float]
    for exponent in range(-126, 128):
        bits = np.uint32((exponent + 127) << 23) - np.arange(1, 24, dtype=np.uint32)
        for value in bits.view(np.float32):
            x = np.zeros((1, 32), np.float32)
            x[0, 3] = value
            expected = int(np.floor(libm.log2f(float(value)))) - 2 + 127
            assert aq.quantize(x, "mxfp4").data[0] == expected & 255


@pytest.mark.parametrize("name", ["q4_1", "q5_k", "q6_k", "iq4_nl", "q2_k", "tq2_0"])
def test_a_scale_that_overflows_is_refused(kernels: ModuleType, name: str) -> None:
    x = golden.weights("normal").copy()
    x[7, 700] = 3e38
    with pytest.raises(NonFiniteError) as caught:
        quantize(kernels, name, x)
    assert caught.value.index == 7 * golden.COLUMNS + 700


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q4_k", "mxfp4", "tq1_0", "iq4_xs"])
def test_what_is_not_finite_is_refused(kernels: ModuleType, name: str, value: float) -> None:
    x = golden.weights("normal").copy()
    x[9, 11] = value
    with pytest.raises(NonFiniteError) as caught:
        quantize(kernels, name, x)
    assert caught.value.index == 9 * golden.COLUMNS + 11


def test_types_that_cannot_be_quantized_to_say_so() -> None:
    for name in ("iq2_xs", "nvfp4", "q8_k", "i8"):
        with pytest.raises(UnsupportedTypeError, match=name):
            aq.quantize(np.ones((1, 256), np.float32), name)


def test_an_imatrix_of_the_wrong_length_or_with_odd_numbers_is_refused() -> None:
    x = np.ones((2, 64), np.float32)
    with pytest.raises(ShapeError, match="64 importances"):
        aq.quantize(x, "q4_0", imatrix=np.ones(32))
    for odd in (-1.0, np.nan, np.inf):
        with pytest.raises(ArgumentError, match="not negative"):
            aq.quantize(x, "q4_0", imatrix=np.full(64, odd))


@pytest.mark.parametrize("name", [n for n in golden.DECODED if n not in ("f16", "bf16")])
def test_products_with_every_type(name: str) -> None:
    type_ = TYPES[name]
    k = max(256, type_.block_size)
    data = golden.blocks(name)[: 4 * type_.row_bytes(k)]
    w = aq.QTensor(data, (4, k), name)
    x = golden.weights("normal")[:3, :k]
    expected = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
    got = aq.matmul(x, w, compute="fp32")
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
