"""Quantizing and dequantizing: every ISA and NumPy. GB/s counts bytes read and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import azquant as aq

TYPES = ["q4_0", "q8_0", "f16", "bf16"]
SHAPES = [(256, 1024), (4096, 4096)]
"""In the second-level cache, and far outside it."""


def weights(shape: tuple[int, int]) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def name(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.benchmark(group="quantize", min_rounds=5, max_time=0.4)
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def bench_quantize(measure: Callable[..., Any], backend: str, type: str, shape: tuple[int, int]) -> None:
    x = weights(shape)
    q = aq.quantize(x, type)
    measure(lambda: aq.quantize(x, type), nbytes=x.nbytes + q.nbytes)


@pytest.mark.benchmark(group="dequantize", min_rounds=5, max_time=0.4)
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def bench_dequantize(measure: Callable[..., Any], backend: str, type: str, shape: tuple[int, int]) -> None:
    x = weights(shape)
    q = aq.quantize(x, type)
    measure(q.dequantize, nbytes=x.nbytes + q.nbytes)


@pytest.mark.benchmark(group="pack", min_rounds=3, max_time=0.4)
@pytest.mark.parametrize("type", ["q4_0", "q8_0"])
def bench_pack(measure: Callable[..., Any], backend: str, type: str) -> None:
    q = aq.quantize(weights((4096, 4096)), type)
    measure(lambda: aq.QTensor(q.data, q.shape, type).pack(), nbytes=2 * q.nbytes)
