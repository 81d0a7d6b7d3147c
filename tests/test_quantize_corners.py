"""Zeros of both signs, subnormals, ties and neighbours of powers of two: every ISA gives NumPy's bytes."""

from __future__ import annotations

import numpy as np
import pytest

import azquant as aq
from azquant import _fallback
from azquant.types import TYPES

NAMES = [name for name, type_ in TYPES.items() if type_.can_quantize and type_.block_size > 1]


def corners() -> np.ndarray:
    random = np.random.default_rng(1)
    x = random.normal(size=(96, 256)).astype(np.float32)
    chance = random.random(x.shape)
    negative = np.float32(-0.0)
    x[:32][chance[:32] < 0.5] = 0
    x[:16][chance[:16] < 0.25] = negative
    x[8:16] = np.abs(x[8:16])
    x[8:12][chance[8:12] < 0.15] = negative
    x[16:24] = -np.abs(x[16:24])
    x[32:36] = np.where(chance[32:36] < 0.5, negative, np.float32(0))
    x[36:48] *= np.float32(1e-38)
    x[48:60] *= np.float32(1e-42)
    x[60:72] = np.round(x[60:72] * 2) / 2
    powers = np.exp2(np.round(np.clip(x[72:84], -1.8, 1.8) * 8))
    x[72:84] = powers * np.where(chance[72:84] < 0.5, 1, 1 - 2.0**-24)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_corners(name: str, isa: str) -> None:
    x = corners()
    assert aq.quantize(x, name).data.tobytes() == _fallback.quantize(TYPES[name].id, x).tobytes()
