"""What this machine can do at best: the figures that speeds are a percentage of."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from azquant._backend import kernels
from azquant.cpu import _prepare

__all__ = ["peak_bf16", "peak_int8", "stream_read"]


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


def _peak(work: Callable[[int], int], runs: int) -> float:
    _prepare()
    rounds = 500_000
    done = work(rounds)
    return done / _shortest(lambda: work(rounds), runs) if done else 0.0


def peak_int8(runs: int = 5) -> float:
    """Int8 multiply-adds per second of all threads together, out of registers, by the active ISA.

    0 on the NumPy backend.
    """
    return _peak(kernels().peak_int8, runs)


def peak_bf16(runs: int = 5) -> float:
    """Bf16 multiply-adds per second of all threads together, out of registers (AMX: with operands from the
    first-level cache), by the active ISA.

    0 on the NumPy backend and on ISAs without bf16 instructions.
    """
    return _peak(kernels().peak_bf16, runs)
