"""What this machine can do at best: the figures that speeds are a percentage of."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from azquant._backend import kernels
from azquant.cpu import _prepare

__all__ = ["peak_int8", "stream_read"]


def _shortest(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def stream_read(nbytes: int, runs: int = 5) -> float:
    """Bytes per second at which all threads together read a buffer of ``nbytes`` bytes, over and over.

    The size matters: a buffer that fits a cache is read at the cache's speed. The best of ``runs``.
    """
    _prepare()
    buffer = np.ones(max(64, nbytes // 64 * 64), np.uint8)
    passes = max(1, (1 << 27) // buffer.nbytes)

    def read() -> None:
        for _ in range(passes):
            kernels().stream_read(buffer)

    read()
    return passes * buffer.nbytes / _shortest(read, runs)


def peak_int8(runs: int = 5) -> float:
    """Int8 multiply-adds per second of all threads together, out of registers, by the active ISA.

    0 on the NumPy backend.
    """
    _prepare()
    rounds = 500_000
    done: int = kernels().peak_int8(rounds)
    return done / _shortest(lambda: kernels().peak_int8(rounds), runs)
