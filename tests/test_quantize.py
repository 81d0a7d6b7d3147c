"""Blocks: the bytes that ggml makes, on every ISA and in NumPy, for every kind of float and of array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from golden_input import fnv1a, golden_hashes, golden_input, golden_input_hash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import azquant as aq
from azquant import _fallback
from azquant.errors import DTypeError, NonFiniteError, ShapeError, UnsupportedTypeError
from azquant.ops import encode_rows
from azquant.types import get_type

TYPES = ["f32", "f16", "bf16", "q4_0", "q8_0"]
BLOCK_TYPES = ["q4_0", "q8_0"]
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Floats = npt.NDArray[np.float32]


# ---- golden bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [*BLOCK_TYPES, "f16", "bf16"])
def test_bytes_of_the_shared_golden_input(shared_data: Path, isa: str, type: str) -> None:
    folder = shared_data / "golden-quants"
    x = np.fromfile(folder / "input_32x1024_f32.bin", dtype="<f4").reshape(32, 1024)
    golden = np.fromfile(folder / f"{type.upper()}.q.bin", dtype=np.uint8)
    q = aq.quantize(x, type)
    rows = (q.data.reshape(32, -1) != golden.reshape(32, -1)).any(axis=1).nonzero()[0]
    assert not rows.size, f"rows {rows} differ from ggml's"
    values = folder / f"{type.upper()}.dq.f32.bin"
    if values.exists():
        assert q.dequantize().tobytes() == values.read_bytes()


def test_the_generator_makes_the_golden_input() -> None:
    assert fnv1a(golden_input()) == golden_input_hash()


@pytest.mark.parametrize("type", TYPES)
def test_hashes_of_ggmls_bytes(isa: str, type: str) -> None:
    blocks, values = golden_hashes()[type]
    q = aq.quantize(golden_input(), type)
    assert fnv1a(q.data) == blocks
    assert fnv1a(q.dequantize()) == values


def test_the_committed_hashes_are_what_the_reference_makes() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    import golden_input as module

    assert module._make_golden.header() == (module.FOLDER / "golden.h").read_text(encoding="utf-8")


# ---- C against NumPy ---------------------------------------------------------------------------------

KINDS = st.sampled_from(["bits", "narrow", "halves", "ties", "subnormal"])


@st.composite
def rows(draw: st.DrawFn) -> Floats:
    """(rows, k) finite float32, k a multiple of 32: any bit pattern, narrow ranges, exact halves, ties."""
    shape = (draw(st.integers(1, 4)), 32 * draw(st.integers(1, 5)))
    seed = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(KINDS)
    if kind == "bits":
        x = seed.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        x = np.where(np.abs(x) < 5e5, x, np.float32(1))
    elif kind == "halves":
        x = (seed.integers(-255, 255, shape) / 2).astype(np.float32)
    elif kind == "ties":
        x = seed.choice(np.float32([-2.5, 2.5, 0, -0.0]), shape)
    elif kind == "subnormal":
        x = seed.integers(0, 2**23, shape, dtype=np.uint32).view(np.float32)
    else:
        x = seed.normal(0, 10.0 ** draw(st.integers(-12, 4)), shape).astype(np.float32)
    places = hnp.arrays(np.float32, 3, elements=st.floats(-(2.0**18), 2.0**18, width=32))
    x = np.ascontiguousarray(x)
    x.reshape(-1)[seed.integers(0, x.size, 3)] = draw(places)
    return x


@EXAMPLES
@given(x=rows())
@pytest.mark.parametrize("type", TYPES)
def test_c_and_numpy_make_the_same_bytes_and_values(c_isa: str, type: str, x: Floats) -> None:
    kind = get_type(type)
    q = aq.quantize(x, type)
    assert np.array_equal(q.data, _fallback.quantize(kind.id, x))
    assert q.dequantize().tobytes() == _fallback.dequantize(kind.id, q.data, *x.shape).tobytes()


@EXAMPLES
@given(blocks=st.binary(min_size=34, max_size=34 * 6), type=st.sampled_from(TYPES))
def test_any_bytes_can_be_dequantized(c_isa: str, blocks: bytes, type: str) -> None:
    kind = get_type(type)
    n = len(blocks) // kind.block_bytes
    data = np.frombuffer(blocks, dtype=np.uint8)[: n * kind.block_bytes]
    values = aq.QTensor(data, (n * kind.block_size,), type).dequantize()
    with np.errstate(invalid="ignore"):
        expected = _fallback.dequantize(kind.id, data, 1, n * kind.block_size)[0]
    assert np.array_equal(values, expected, equal_nan=True)


@EXAMPLES
@given(x=rows(), type=st.sampled_from(BLOCK_TYPES))
def test_every_weight_is_within_its_blocks_step(isa: str, x: Floats, type: str) -> None:
    back = aq.quantize(x, type).dequantize()
    blocks, decoded = x.reshape(-1, 32).astype(np.float64), back.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    # Q4_0 has 16 steps of amax / 8 from one end: half a step, or a whole one at the far end. fp16 scales are
    # rounded by 2^-11 and vanish below 2^-25.
    step = amax / (8 if type == "q4_0" else 127)
    bound = step * (1 if type == "q4_0" else 0.5) + amax * 2.0**-10 + 130 * 2.0**-25
    assert (np.abs(blocks - decoded) <= bound).all()


def test_a_zero_block_keeps_the_references_negative_zero_scale(isa: str) -> None:
    for zero in (0.0, -0.0):
        q = aq.quantize(np.full((1, 32), zero, np.float32), "q4_0")
        assert q.data.tobytes() == b"\x00\x80" + b"\x88" * 16
        assert aq.quantize(np.full((1, 32), zero, np.float32), "q8_0").data.tobytes() == bytes(34)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_change_nothing(c_isa: str, threads: int) -> None:
    x = np.random.default_rng(1).normal(size=(300, 1024)).astype(np.float32)
    aq.set_num_threads(threads)
    for type in TYPES:
        assert np.array_equal(aq.quantize(x, type).data, _fallback.quantize(get_type(type).id, x))
        assert np.array_equal(aq.quantize(x.reshape(-1), type).data, aq.quantize(x, type).data)


# ---- arrays ------------------------------------------------------------------------------------------


def test_a_result_too_large_for_a_cache_is_the_same(c_isa: str) -> None:
    few = np.random.default_rng(0).standard_normal((250, 4127), dtype=np.float32)  # rows of 8254 bytes
    made = aq.quantize(few, "f16").data.reshape(-1)
    times = (17 << 20) // made.size + 1  # from 16 MB on, results are stored past the caches
    many = aq.quantize(np.tile(few, (times, 1)), "f16").data.reshape(times, -1)
    assert (many == made).all()


def test_dtypes_are_converted_to_float32_first(isa: str) -> None:
    x = np.random.default_rng(2).normal(size=(3, 64))
    for dtype in (np.float16, np.float64, np.longdouble, ">f4", ">f2"):
        given_x = x.astype(dtype)
        assert np.array_equal(aq.quantize(given_x).data, aq.quantize(given_x.astype(np.float32)).data)
    assert aq.quantize(x.tolist()).shape == (3, 64)


def test_bfloat16_is_taken(isa: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(2).normal(size=(3, 64)).astype(ml_dtypes.bfloat16)
    assert np.array_equal(aq.quantize(x).data, aq.quantize(x.astype(np.float32)).data)


def test_layout_of_the_input_does_not_matter(isa: str) -> None:
    x = np.random.default_rng(3).normal(size=(64, 96)).astype(np.float32)
    expected = aq.quantize(x.T.copy()).data
    assert np.array_equal(aq.quantize(x.T).data, expected)
    wide = np.zeros((96, 200), np.float32)
    wide[:, 3:67] = x.T
    assert np.array_equal(aq.quantize(wide[:, 3:67]).data, expected)
    assert np.array_equal(aq.quantize(np.asfortranarray(x.T)).data, expected)
    unaligned = np.frombuffer(b"\0" + x.T.tobytes(), dtype=np.float32, offset=1).reshape(96, 64)
    assert not unaligned.flags.aligned
    assert np.array_equal(aq.quantize(unaligned).data, expected)
    frozen = x.T.copy()
    frozen.flags.writeable = False
    assert np.array_equal(aq.quantize(frozen).data, expected)


@pytest.mark.parametrize("type", TYPES)
def test_blocks_at_an_odd_address_are_read_right(isa: str, type: str) -> None:
    x = np.random.default_rng(4).normal(size=(5, 64)).astype(np.float32)
    q = aq.quantize(x, type)
    shifted = np.frombuffer(b"\0" + q.data.tobytes(), dtype=np.uint8, offset=1)
    other = aq.QTensor(shifted, q.shape, type)
    assert np.array_equal(other.dequantize(), q.dequantize())
    assert np.array_equal(aq.matmul(x, other), aq.matmul(x, q))


@pytest.mark.parametrize(
    "shape", [(0, 64), (3, 0), (0, 0), (0,), (2, 0, 32), (2, 3, 32), (1, 1, 1, 64), (32,)]
)
@pytest.mark.parametrize("type", TYPES)
def test_shapes(isa: str, shape: tuple[int, ...], type: str) -> None:
    q = aq.quantize(np.ones(shape, np.float32), type)
    assert q.shape == shape
    assert q.ndim == len(shape)
    assert q.nbytes == int(np.prod(shape)) * q.type.block_bytes // q.type.block_size
    back = aq.dequantize(q)
    assert back.shape == shape
    assert back.dtype == np.float32
    assert (np.abs(back - 1) < 1e-4).all()


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", TYPES)
def test_the_first_element_that_is_no_number_is_named(isa: str, type: str, value: float) -> None:
    x = np.ones((40, 4096), np.float32)
    x[17, 100] = value
    x[17, 101] = x[39, 4095] = np.nan
    with pytest.raises(NonFiniteError, match="row 17, column 100") as caught:
        aq.quantize(x, type)
    assert caught.value.index == 17 * 4096 + 100
    assert caught.value.tensor is None
    with pytest.raises(NonFiniteError, match=r"tensor 'blk\.0\.w': .*row 1017") as caught:
        encode_rows(x, get_type(type), tensor="blk.0.w", first_row=1000)
    assert caught.value.tensor == "blk.0.w"
    assert caught.value.index == 1017 * 4096 + 100


def test_a_nan_is_found_wherever_it_lies_in_memory(c_isa: str) -> None:
    memory = np.zeros(128, np.float32)
    for first in range(16):
        x = memory[first : first + 96].reshape(1, 96)
        for at in range(96):
            x[0, at] = np.nan
            with pytest.raises(NonFiniteError) as caught:
                aq.quantize(x)
            assert caught.value.index == at
            x[0, at] = 0


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "f16"])
def test_rows_of_any_length_are_the_same_as_one_by_one(c_isa: str, type: str) -> None:
    x = np.random.default_rng(0).normal(size=(100, 96)).astype(np.float32)
    x[40] *= 2e4  # large, and no scale overflows
    rows = [aq.quantize(row, type).data for row in x]
    assert np.array_equal(aq.quantize(x, type).data, np.concatenate(rows))


@pytest.mark.parametrize(("type", "limit"), [("q4_0", 65520.0 * 8), ("q8_0", 65520.0 * 127)])
def test_a_weight_too_large_for_its_scale_is_refused(isa: str, type: str, limit: float) -> None:
    below = np.nextafter(np.float32(limit), np.float32(0))
    assert np.isfinite(aq.quantize(np.full((1, 32), below), type).dequantize()).all()
    for sign in (1, -1):
        x = np.ones((2, 32), np.float32)
        x[1, 5] = sign * limit
        with pytest.raises(NonFiniteError, match="too large") as caught:
            aq.quantize(x, type)
        assert caught.value.index == 37


def test_large_numbers_become_infinite_in_plain_types_but_not_in_files(isa: str) -> None:
    x = np.float32([[1.0, -1e6]])
    assert np.array_equal(aq.quantize(x, "f16").dequantize(), np.float32([[1.0, -np.inf]]))
    with pytest.raises(NonFiniteError, match="row 0, column 1") as caught:
        encode_rows(x, get_type("f16"))
    assert caught.value.index == 1
    largest = np.float32([[np.finfo(np.float32).max]])
    assert np.isinf(aq.quantize(largest, "bf16").dequantize()).all()
    with pytest.raises(NonFiniteError):
        encode_rows(largest, get_type("bf16"))


def test_a_float64_beyond_float32_is_refused(isa: str) -> None:
    with pytest.raises(NonFiniteError):
        aq.quantize(np.full((1, 32), 1e300), "q8_0")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.bool_, np.complex64, object, "U3"])
def test_other_dtypes_are_refused(isa: str, dtype: object) -> None:
    with pytest.raises(DTypeError, match="floating point"):
        aq.quantize(np.zeros((1, 32), dtype))


def test_shapes_that_are_no_rows_of_blocks_are_refused(isa: str) -> None:
    for k in (1, 31, 33, 48):
        with pytest.raises(ShapeError, match=str(k)):
            aq.quantize(np.ones((2, k), np.float32), "q4_0")
    with pytest.raises(ShapeError, match="dimension"):
        aq.quantize(np.float32(1.0), "q4_0")
    with pytest.raises(ShapeError, match="dimension"):
        aq.quantize(1.5, "f16")


def test_types_that_cannot_be_made_are_refused(isa: str) -> None:
    x = np.ones((1, 256), np.float32)
    with pytest.raises(UnsupportedTypeError, match="known are"):
        aq.quantize(x, "q3_7")
    with pytest.raises(UnsupportedTypeError, match="known are"):
        aq.quantize(x, 2)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedTypeError, match="iq2_xxs"):
        aq.quantize(x, "iq2_xxs")
    with pytest.raises(UnsupportedTypeError, match="i16"):
        aq.QTensor(np.zeros(512, np.uint8), (1, 256), "i16").dequantize()


def test_a_qtensor_checks_its_bytes() -> None:
    with pytest.raises(ShapeError, match="36 bytes, not 35"):
        aq.QTensor(np.zeros(35, np.uint8), (2, 32), "q4_0")
    with pytest.raises(ShapeError, match="dimension"):
        aq.QTensor(np.zeros(0, np.uint8), (), "q4_0")
    with pytest.raises(ShapeError, match="negative"):
        aq.QTensor(np.zeros(0, np.uint8), (-1, 32), "q4_0")
    with pytest.raises(DTypeError, match="uint8"):
        aq.QTensor(np.zeros(18, np.int8), (1, 32), "q4_0")  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="uint8"):
        aq.QTensor(bytes(18), (1, 32), "q4_0")  # type: ignore[arg-type]
    assert repr(aq.QTensor(np.zeros(36, np.uint8), (2, 32))) == "QTensor(2x32, q4_0, 36 bytes)"
