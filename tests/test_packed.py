"""The entry points on packed weights in the caller's memory, below PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import azquant as aq
from azquant._backend import kernels
from azquant.errors import ShapeError, UnsupportedTypeError

TYPES = ["q4_0", "q8_0", "f16", "q6_k"]


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """nbytes with guard bytes behind, the first on a cache line."""
    whole = np.full(nbytes + 128, 0xA5, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + nbytes + 64]


def packed(q: aq.QTensor) -> NDArray[np.uint8]:
    n, k = q.shape
    nbytes = kernels().packed_bytes(q.type.id, n, k)
    buffer = aligned(nbytes)
    kernels().pack(q.type.id, q.data, n, k, buffer[:nbytes], 2)
    assert (buffer[nbytes:] == 0xA5).all()
    return buffer[:nbytes]


def product(
    q: aq.QTensor,
    p: NDArray[np.uint8],
    bias: NDArray[np.float32] | None,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    compute: str,
    threads: int,
) -> None:
    bias_at = 0 if bias is None else bias.ctypes.data
    kernels().matmul_packed(
        q.type.id, p.ctypes.data, *q.shape, bias_at, x.ctypes.data, len(x), y.ctypes.data, compute, threads
    )


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize("k", [256, 768])
def test_packed_weights_do_what_their_bytes_do(isa: str, type: str, n: int, k: int) -> None:
    random = np.random.default_rng(n + k)
    q = aq.quantize(random.normal(size=(n, k)).astype(np.float32), type)
    p = packed(q)
    assert np.array_equal(kernels().unpack(q.type.id, p, n, k, 1), q.data)
    rows = random.integers(0, n, 40)
    found = np.full((41, k), 7.0, np.float32)
    kernels().packed_rows(q.type.id, p, n, k, rows, found[:40], 2)
    assert np.array_equal(found[:40], q.dequantize()[rows])
    assert (found[40] == 7).all()
    x, bias = random.normal(size=(5, k)).astype(np.float32), random.normal(size=n).astype(np.float32)
    for compute in ("auto", "bf16", "fp32"):
        y = np.full((6, n), 7.0, np.float32)
        product(q, p, None, x, y, compute, 1)
        assert np.array_equal(y[:5], aq.matmul(x, q, compute))
        assert (y[5] == 7).all()
        with_bias = np.empty((5, n), np.float32)
        product(q, p, bias, x, with_bias, compute, 2)
        assert np.array_equal(with_bias, y[:5] + bias)


def test_refusals(isa: str) -> None:
    q = aq.quantize(np.ones((4, 32), np.float32))
    p, out = packed(q), np.empty((1, 32), np.float32)
    for row in (-1, 4):
        with pytest.raises(ShapeError):
            kernels().packed_rows(2, p, 4, 32, np.array([row]), out, 1)
    f16 = aq.quantize(np.ones((4, 32), np.float32), "f16")
    with pytest.raises(UnsupportedTypeError):
        product(f16, packed(f16), None, out, np.empty((1, 4), np.float32), "int8", 1)


def test_threads_of_one_call_are_forgotten_after_it(needs_c: None) -> None:
    aq.set_num_threads(2)
    packed(aq.quantize(np.ones((64, 64), np.float32)))
    assert aq.num_threads() == 2
