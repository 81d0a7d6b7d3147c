"""matmul: error bounds against float64, equal bits everywhere, every shape and kind of input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import azquant as aq
from azquant.errors import ArgumentError, DTypeError, ShapeError, UnsupportedTypeError
from azquant.ops import COMPUTE_MODES

TYPES = ["f32", "f16", "bf16", "q4_0", "q8_0"]
INT8_TYPES = ["q4_0", "q8_0"]
BOUNDS = {"int8": 1e-2, "bf16": 6e-3, "fp32": 1e-5}
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Floats = npt.NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def relative_error(y: Floats, x: npt.NDArray[np.floating], w: aq.QTensor) -> float:
    """Relative L2 error against float64. The few sums of a tiny product may happen to cancel, so the result's
    norm counts for no less than its terms' (its expected size when signs are random)."""
    exact_x, exact_w = x.astype(np.float64), w.dequantize().astype(np.float64)
    exact = exact_x @ exact_w.T
    size = max(np.linalg.norm(exact), np.sqrt(((exact_x**2) @ (exact_w**2).T).sum()))
    error = np.linalg.norm(y - exact)
    return float(error / size) if size else float(error)


def worst_case(x: Floats, w: aq.QTensor, mode: str) -> npt.NDArray[np.float64]:
    """The error that no element can exceed: fp32 sums; for int8 half a step of each activation, for bf16 half
    a unit in the eighth bit of either factor."""
    exact_x, exact_w = np.abs(x.astype(np.float64)), np.abs(w.dequantize().astype(np.float64))
    bound = (1e-5 + (2**-8 + 2**-18 if mode == "bf16" else 0)) * exact_x @ exact_w.T
    if mode == "int8":
        amax = exact_x.reshape(len(x), -1, 32).max(axis=2)
        bound += (amax / 254) @ exact_w.reshape(len(exact_w), -1, 32).sum(axis=2).T
    return bound


def exact_mode(type: str, compute: str) -> str:
    """int8 means fp32 for a type without it."""
    return "fp32" if compute == "int8" and type not in INT8_TYPES else compute


def bits(y: Floats) -> npt.NDArray[np.uint32]:
    """Bit patterns, with every NaN alike."""
    return np.where(np.isnan(y), np.float32(np.nan), y).view(np.uint32)


# ---- accuracy ----------------------------------------------------------------------------------------


@EXAMPLES
@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17, 33, 65]),
    n=st.sampled_from([1, 2, 7, 15, 16, 17, 31, 64, 100]),
    k=st.integers(1, 12).map(lambda blocks: 32 * blocks),
    type=st.sampled_from(TYPES),
    compute=st.sampled_from(COMPUTE_MODES),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_error_is_within_the_bound(
    isa: str, m: int, n: int, k: int, type: str, compute: str, spread: float
) -> None:
    if compute == "int8" and type not in INT8_TYPES:
        compute = "auto"
    x, w = normal(m, k) * np.float32(spread), aq.quantize(normal(n, k, seed=1), type)
    y = aq.matmul(x, w, compute)
    assert y.shape == (m, n)
    assert y.dtype == np.float32
    mode = aq.cpu.choice(m, n, k, type).compute if compute == "auto" else compute
    error = np.abs(y - x.astype(np.float64) @ w.dequantize().astype(np.float64).T)
    assert (error <= worst_case(x, w, mode)).all()
    if m * n >= 64:  # a few sums are a small sample
        assert relative_error(y, x, w) <= BOUNDS[mode]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1024, 4096), (64, 768, 3072)])
@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
def test_plain_relative_error_of_large_products(isa: str, compute: str, m: int, n: int, k: int) -> None:
    if isa == "scalar":
        m = min(m, 4)  # the definition is slow
    x, w = normal(m, k), aq.quantize(normal(n, k, seed=1), "q4_0")
    exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
    y = aq.matmul(x, w, compute)
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) <= BOUNDS[compute]


def test_int8_is_what_the_numerics_contract_says() -> None:
    """DESIGN: d_a = amax / 127, q = RNE(x * (127 / amax)); float64 sums of the rounded products."""
    x, w = normal(5, 256), aq.quantize(normal(7, 256, seed=1), "q4_0")
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    rounded = np.rint(blocks * (np.float32(127) / amax)).astype(np.float64) * (amax / np.float32(127))
    expected = rounded.reshape(x.shape) @ w.dequantize().astype(np.float64).T
    assert np.allclose(aq.matmul(x, w, "int8"), expected, rtol=1e-5, atol=1e-5)


# ---- equal bits --------------------------------------------------------------------------------------


@EXAMPLES
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 90),
    k=st.integers(1, 10).map(lambda blocks: 32 * blocks),
    type=st.sampled_from(TYPES),
    compute=st.sampled_from(["int8", "fp32"]),
    threads=st.integers(1, 4),
)
def test_bits_are_the_same_on_every_isa_and_for_every_thread_count(
    c_isa: str, m: int, n: int, k: int, type: str, compute: str, threads: int
) -> None:
    compute = exact_mode(type, compute)
    x, w = normal(m, k), aq.quantize(normal(n, k, seed=1), type)
    if m > 2:
        x[m // 2, 3] = np.inf
    aq.use_isa("scalar")
    aq.set_num_threads(1)
    expected = bits(aq.matmul(x, w, compute))
    aq.use_isa(c_isa)
    aq.set_num_threads(threads)
    assert np.array_equal(bits(aq.matmul(x, w, compute)), expected)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(c_isa: str, type: str, compute: str) -> None:
    compute = exact_mode(type, compute)
    x, w = normal(131, 160), aq.quantize(normal(37, 160, seed=1), type)
    batch = aq.matmul(x, w, compute)
    for size in (1, 2, 3, 7, 64, 130):
        first = 131 - size
        assert np.array_equal(bits(aq.matmul(x[first:], w, compute)), bits(batch[first:])), size


def test_packing_early_or_late_changes_nothing(isa: str) -> None:
    for type in TYPES:
        w = aq.quantize(normal(33, 416), type)
        before, x = w.data.copy(), normal(3, 416)
        fresh = aq.matmul(x, aq.QTensor(w.data, w.shape, type))
        assert w.packed_nbytes == 0
        assert w.pack() is w
        assert np.array_equal(aq.matmul(x, w), fresh)
        if type in INT8_TYPES:
            assert w.packed_nbytes > 0
            assert np.array_equal(w.unpack(), before)
        assert np.array_equal(w.data, before)


def test_the_packed_form_is_at_most_4_6_bits_a_weight(c_isa: str) -> None:
    w = aq.quantize(normal(512, 1024), "q4_0").pack()
    assert w.packed_nbytes * 8 / (512 * 1024) <= 4.6


# ---- shapes and inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("compute", ["auto", "bf16", "fp32"])
def test_nothing_times_nothing(isa: str, type: str, compute: str) -> None:
    for m in (0, 1, 3):
        for n in (0, 1, 5):
            for k in (0, 32, 64):
                w = aq.quantize(np.ones((n, k), np.float32), type)
                y = aq.matmul(np.ones((m, k), np.float32), w, compute)
                assert y.shape == (m, n)
                assert np.allclose(y, k, rtol=1e-3)


def test_leading_dimensions_are_kept(isa: str) -> None:
    w, x = aq.quantize(normal(5, 64), "q8_0"), normal(2, 3, 4, 64)
    y = aq.matmul(x, w)
    assert y.shape == (2, 3, 4, 5)
    assert np.array_equal(y.reshape(-1, 5), aq.matmul(x.reshape(-1, 64), w))
    assert aq.matmul(x[0, 0, 0], w).shape == (5,)
    assert aq.matmul(x[:, :0], w).shape == (2, 0, 4, 5)


def test_dtypes_are_converted_to_float32_first(isa: str) -> None:
    w, x = aq.quantize(normal(5, 64), "q4_0"), normal(3, 64)
    for dtype in (np.float16, np.float64, ">f4"):
        given_x = x.astype(dtype)
        assert np.array_equal(aq.matmul(given_x, w), aq.matmul(given_x.astype(np.float32), w))
    assert np.array_equal(aq.matmul(x.tolist(), w), aq.matmul(x, w))


def test_bfloat16_is_taken(isa: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w, x = aq.quantize(normal(5, 64), "q4_0"), normal(3, 64).astype(ml_dtypes.bfloat16)
    assert np.array_equal(aq.matmul(x, w), aq.matmul(x.astype(np.float32), w))


def test_layout_of_the_input_does_not_matter(isa: str) -> None:
    w, x = aq.quantize(normal(5, 64), "q4_0"), normal(6, 64)
    expected = aq.matmul(x, w)
    wide = np.zeros((12, 200), np.float32)
    wide[::2, 3:67] = x
    assert np.array_equal(aq.matmul(wide[::2, 3:67], w), expected)
    assert np.array_equal(aq.matmul(np.asfortranarray(x), w), expected)
    assert np.array_equal(aq.matmul(x[::-1], w), expected[::-1])
    unaligned = np.frombuffer(b"\0" + x.tobytes(), dtype=np.float32, offset=1).reshape(6, 64)
    assert np.array_equal(aq.matmul(unaligned, w), expected)
    frozen = x.copy()
    frozen.flags.writeable = False
    assert np.array_equal(aq.matmul(frozen, w), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_a_row_that_is_no_number_spoils_itself_only(isa: str, compute: str, value: float) -> None:
    x, w = normal(9, 96), aq.quantize(normal(33, 96, seed=1), "q4_0")
    good = aq.matmul(x, w, compute)
    x[4, 40] = value
    y = aq.matmul(x, w, compute)
    if compute in ("fp32", "bf16") and np.isinf(value):  # infinity times a weight that is not 0
        assert not np.isfinite(y[4]).any()
    else:
        assert np.isnan(y[4]).all()
    others = np.arange(9) != 4
    assert np.array_equal(y[others], good[others]) or isa == "numpy"
    assert np.allclose(y[others], good[others], rtol=1e-5, atol=1e-5)


def test_huge_and_tiny_activations_stay_numbers(isa: str) -> None:
    w = aq.quantize(normal(16, 64), "q4_0")
    for size in (1e-44, 1e-38, 1e-30, 1e30):
        x = (normal(2, 64) * size).astype(np.float32)
        y = aq.matmul(x, w, "int8")
        assert np.isfinite(y).all()
        if size > 1e-36:
            assert relative_error(y, x, w) <= BOUNDS["int8"]


# ---- refusals ----------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused(isa: str) -> None:
    w = aq.quantize(normal(5, 64), "q4_0")
    with pytest.raises(ShapeError, match=r"32 columns.*\(5, 64\) need 64"):
        aq.matmul(normal(3, 32), w)
    with pytest.raises(ShapeError, match="dimension"):
        aq.matmul(np.float32(1), w)
    for shape in ((64,), (2, 5, 64)):
        with pytest.raises(ShapeError, match="two dimensions"):
            aq.matmul(normal(3, 64), aq.quantize(np.ones(shape, np.float32)))


def test_other_dtypes_are_refused(isa: str) -> None:
    w = aq.quantize(normal(5, 64), "q4_0")
    for dtype in (np.int32, np.bool_, np.complex64, object):
        with pytest.raises(DTypeError, match="floating point"):
            aq.matmul(np.zeros((1, 64), dtype), w)
    with pytest.raises(DTypeError, match="QTensor"):
        aq.matmul(normal(3, 64), normal(5, 64))  # type: ignore[arg-type]


def test_modes_are_refused_by_name(isa: str) -> None:
    x = normal(3, 64)
    with pytest.raises(ArgumentError, match="auto, int8, bf16, fp32"):
        aq.matmul(x, aq.quantize(normal(5, 64)), "int4")
    with pytest.raises(UnsupportedTypeError):
        aq.matmul(x, aq.quantize(normal(5, 64), "f16"), "int8")
    with pytest.raises(UnsupportedTypeError, match="i16"):
        aq.matmul(normal(3, 256), aq.QTensor(np.zeros(512, np.uint8), (1, 256), "i16"))
