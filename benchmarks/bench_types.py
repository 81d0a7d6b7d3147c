"""Quantizing and dequantizing every ggml type, with and without an importance matrix: every ISA and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import azquant as aq
from azquant.types import TYPES

QUANTIZED = [name for name, row in TYPES.items() if row.can_quantize and row.is_quantized]
WEIGHTED = [name for name in QUANTIZED if name not in ("q8_0", "tq1_0", "tq2_0", "mxfp4")]
DECODED = [name for name, row in TYPES.items() if row.can_dequantize and row.is_quantized]
SHAPE = (64, 2048)


def weights() -> Any:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * np.float32(0.02)


@pytest.mark.benchmark(group="quantize every type", min_rounds=3, max_time=0.2)
@pytest.mark.parametrize("type", QUANTIZED)
def bench_quantize_type(measure: Callable[..., Any], backend: str, type: str) -> None:
    x = weights()
    q = aq.quantize(x, type)
    measure(lambda: aq.quantize(x, type), nbytes=x.nbytes + q.nbytes)


@pytest.mark.benchmark(group="quantize with an importance matrix", min_rounds=3, max_time=0.2)
@pytest.mark.parametrize("type", WEIGHTED)
def bench_quantize_weighted(measure: Callable[..., Any], backend: str, type: str) -> None:
    x = weights()
    importance = np.random.default_rng(1).gamma(1.0, size=SHAPE[1]).astype(np.float32)
    q = aq.quantize(x, type, imatrix=importance)
    measure(lambda: aq.quantize(x, type, imatrix=importance), nbytes=x.nbytes + q.nbytes)


@pytest.mark.benchmark(group="dequantize every type", min_rounds=5, max_time=0.2)
@pytest.mark.parametrize("type", DECODED)
def bench_dequantize_type(measure: Callable[..., Any], backend: str, type: str) -> None:
    size = SHAPE[0] * TYPES[type].row_bytes(SHAPE[1])
    data = np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8) & 0xBB  # no NaN among the scales
    q = aq.QTensor(data, SHAPE, type)
    measure(q.dequantize, nbytes=q.nbytes + 4 * SHAPE[0] * SHAPE[1])
