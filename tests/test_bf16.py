"""compute="bf16": its bound, its bits, and who chooses it. (The kernels themselves: tests/c/check_bf16.c.)"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import azquant as aq
from azquant import cpu, limits
from azquant._backend import kernels
from azquant.errors import ArgumentError, ShapeError, UnsupportedTypeError

TYPES = ["f32", "f16", "bf16", "q4_0", "q8_0", "q6_k", "q4_1", "q5_k", "iq4_nl", "mxfp4"]
OWN_ORDER = ("avx512bf16", "amx")
"""ISAs whose bf16 instructions add in an order of their own."""
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Floats = npt.NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def weights(type: str, n: int, blocks: int) -> aq.QTensor:
    size = {"q6_k": 256, "q5_k": 256, "f32": 1, "f16": 1, "bf16": 1}.get(type, 32)
    k = 29 * blocks if size == 1 else size * blocks  # dense rows end anywhere
    return aq.quantize(normal(n, k, seed=1), type)


def rounded(x: Floats) -> npt.NDArray[np.float64]:
    """To bf16 by another way: split off the bits below the eighth in float64."""
    x64 = x.astype(np.float64)
    _, exponent = np.frexp(x64)
    unit = np.ldexp(1.0, exponent - 8)
    return np.rint(x64 / unit) * unit


@EXAMPLES
@given(
    m=st.integers(0, 70),
    n=st.integers(0, 70),
    blocks=st.integers(0, 5),
    type=st.sampled_from(TYPES),
    threads=st.integers(1, 4),
)
def test_products_are_those_of_rounded_factors(
    isa: str, m: int, n: int, blocks: int, type: str, threads: int
) -> None:
    aq.set_num_threads(threads)
    w = weights(type, n, blocks)
    x = normal(m, w.shape[1])
    y = aq.matmul(x, w, "bf16")
    assert y.shape == (m, n)
    a, b = rounded(x), rounded(w.dequantize())
    assert (np.abs(y - a @ b.T) <= 1e-5 * np.abs(a) @ np.abs(b).T).all()
    exact_x, exact_w = x.astype(np.float64), w.dequantize().astype(np.float64)
    size = np.sqrt(((exact_x**2) @ (exact_w**2).T).sum())
    assert np.linalg.norm(y - exact_x @ exact_w.T) <= 6e-3 * size


@pytest.mark.parametrize("type", TYPES)
def test_bits_do_not_depend_on_threads_batch_or_packing(c_isa: str, type: str) -> None:
    w = weights(type, 53, 3)
    x = normal(40, w.shape[1])
    aq.set_num_threads(1)
    expected = aq.matmul(x, w, "bf16")
    w = aq.QTensor(w.data, w.shape, type).pack()
    for threads in (2, 3, 4):
        aq.set_num_threads(threads)
        assert np.array_equal(aq.matmul(x, w, "bf16"), expected)
        for rows in (slice(0, 1), slice(7, 9), slice(3, 36)):
            assert np.array_equal(aq.matmul(x[rows], w, "bf16"), expected[rows])


@pytest.mark.parametrize("type", TYPES)
def test_isas_without_bf16_instructions_agree_to_the_bit(c_isa: str, type: str) -> None:
    w = weights(type, 37, 2)
    x = normal(21, w.shape[1])
    y = aq.matmul(x, w, "bf16")
    aq.use_isa("scalar")
    expected = aq.matmul(x, w, "bf16")
    if c_isa in OWN_ORDER:
        assert np.allclose(y, expected, rtol=0, atol=1e-4)
    else:
        assert np.array_equal(y, expected)


def test_bf16_weights_and_activations_are_exact(isa: str) -> None:
    x, w = np.round(normal(9, 64) * 8), aq.quantize(np.round(normal(11, 64, seed=1) * 8), "bf16")
    assert np.array_equal(aq.matmul(x, w, "bf16"), x @ w.dequantize().T)


def test_numbers_at_the_ends_of_the_range(isa: str) -> None:
    w = aq.quantize(np.full((3, 32), 0.5, np.float32), "bf16")
    x = np.zeros((4, 32), np.float32)
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 1e-40, 3.3e38, np.finfo(np.float32).max, np.nan
    with np.errstate(all="ignore"):
        y = aq.matmul(x, w, "bf16")
    assert (y[0] == 0).all()  # subnormal
    assert np.allclose(y[1], 1.65e38, rtol=2**-8)
    assert (y[2] == np.inf).all()  # rounds up to infinity
    assert np.isnan(y[3]).all()


# ---- who chooses it ----------------------------------------------------------------------------------


def test_the_choice_names_a_mode_and_a_usable_isa(isa: str) -> None:
    for type in (*TYPES, "iq1_s"):
        for m in (0, 1, 8, 16, 64, 512):
            made = cpu.choice(m, 4096, 4096, type)
            assert made.compute in ("int8", "bf16", "fp32")
            assert made.isa == "numpy" if isa == "numpy" else made.isa in aq.isas()
            for compute in ("bf16", "fp32"):
                assert cpu.choice(m, 64, 256, type, compute).compute == compute
    if isa != "amx":
        assert cpu.choice(512, 64, 256, "q4_0").compute == "int8"
    assert cpu.choice(512, 64, 256, "f32").compute == "fp32"
    assert (cpu.choice(512, 64, 256, "bf16").compute == "bf16") == (isa in OWN_ORDER)
    assert cpu.choice(1, 64, 256).compute == "int8"  # no ISA gains from bf16 at one row


def test_auto_does_what_the_choice_says(c_isa: str) -> None:
    for type in TYPES:
        w = weights(type, 40, 2)
        for m in (1, 15, 16, 64):
            x = normal(m, w.shape[1])
            compute = cpu.choice(m, *w.shape, type).compute
            assert np.array_equal(aq.matmul(x, w), aq.matmul(x, w, compute))


def test_bad_questions_are_refused(isa: str) -> None:
    with pytest.raises(ArgumentError, match="auto, int8, bf16, fp32"):
        cpu.choice(1, 64, 64, compute="int4")
    with pytest.raises(ArgumentError, match="negative"):
        cpu.choice(-1, 64, 64)
    with pytest.raises(ShapeError):
        cpu.choice(1, 64, 33)
    with pytest.raises(UnsupportedTypeError, match="i16"):
        cpu.choice(1, 64, 64, "i16")
    with pytest.raises(UnsupportedTypeError, match="q9_9"):
        cpu.choice(1, 64, 64, "q9_9")
    with pytest.raises(UnsupportedTypeError, match="int8"):
        cpu.choice(1, 64, 64, "f32", "int8")


def test_every_isa_is_usable_or_has_a_reason() -> None:
    usable, refused = aq.isas(), cpu.refusals()
    assert not set(usable) & set(refused)
    assert {name for name, _ in kernels().isas()} == set(usable) | set(refused)
    for name, reason in refused.items():
        assert reason
        with pytest.raises(ArgumentError) as caught:
            aq.use_isa(name)
        assert reason in str(caught.value)


def test_the_bf16_peak_is_measured_where_there_are_instructions(c_isa: str) -> None:
    assert (limits.peak_bf16(runs=1) > 0) == (c_isa in OWN_ORDER)
