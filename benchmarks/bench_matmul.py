"""y (M, N) = x (M, K) · Wᵀ with W in Q4_0: every ISA and NumPy. GOP/s counts 2·M·N·K; GB/s, at M = 1, the
packed weights read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import azquant as aq

SHAPES = [(768, 3072), (4096, 4096)]
SLOW = 2**33
"""Multiply-adds beyond which the scalar kernels, the readable definition, are not worth the wait."""


def shape_name(shape: tuple[int, int]) -> str:
    return "{}x{}".format(*shape)


@pytest.fixture(scope="module")
def matrices() -> dict[tuple[int, int], aq.QTensor]:
    random = np.random.default_rng(0)
    return {shape: aq.quantize(random.normal(size=shape).astype(np.float32)) for shape in SHAPES}


@pytest.mark.parametrize("m", [1, 4, 32, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
def bench_matmul(
    benchmark: Any,
    measure: Callable[..., Any],
    backend: str,
    matrices: dict[tuple[int, int], aq.QTensor],
    compute: str,
    shape: tuple[int, int],
    m: int,
) -> None:
    n, k = shape
    if backend == "scalar" and m * n * k > SLOW // 32:
        pytest.skip("the scalar kernels take seconds here")
    benchmark.group = f"matmul M={m} {shape_name(shape)} {compute}"
    benchmark._min_rounds, benchmark._max_time = 3, 0.4
    x = np.random.default_rng(1).normal(size=(m, k)).astype(np.float32)
    w = aq.QTensor(matrices[shape].data, shape, "q4_0").pack()
    measure(lambda: aq.matmul(x, w, compute), ops=2 * m * n * k, nbytes=w.packed_nbytes if m == 1 else 0)
