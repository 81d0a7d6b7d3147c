"""From how many rows on bf16 beats int8 (or fp32, where a type has no int8 kernels), measured here.

    python benchmarks/choose_compute.py [q4_0 q8_0 ...]

What ``compute="auto"`` does is a table in the kernels (``bf16_rows`` of an ISA's table, csrc/kernels/amx.c);
this is the measurement for such a table, and the check of it on another machine. Both run in turn; medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

import azquant as aq
from azquant import cpu

SHAPES = ((4096, 4096), (768, 3072))  # (N, K)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
TYPES = ("q4_0", "q8_0", "q6_k", "bf16", "q4_k", "q5_k", "q4_1", "iq4_nl", "mxfp4")


def ratio(x: np.ndarray, w: aq.QTensor, exact: str) -> float:
    """Time in bf16 over time in the exact mode."""
    times: dict[str, list[float]] = {"bf16": [], exact: []}
    for turn in range(6):
        for compute, found in times.items():
            start = time.perf_counter()
            aq.matmul(x, w, compute)
            if turn:  # the first fills caches
                found.append(time.perf_counter() - start)
    return statistics.median(times["bf16"]) / statistics.median(times[exact])


def main() -> None:
    """Prints a line for each type and shape."""
    rng = np.random.default_rng(0)
    for type in sys.argv[1:] or TYPES:
        for n, k in SHAPES:
            w = aq.quantize(rng.standard_normal((n, k), dtype=np.float32), type).pack()
            exact = "int8" if w.matrix.can_int8 else "fp32"
            ratios = {m: ratio(rng.standard_normal((m, k), dtype=np.float32), w, exact) for m in ROWS}
            wins = [m for m in ROWS if all(ratios[larger] < 1 for larger in ROWS if larger >= m)]
            auto = next((m for m in ROWS if cpu.choice(m, n, k, type).compute == "bf16"), None)
            measured = f"from {wins[0]} rows" if wins else "never"
            table = f"from {auto} rows" if auto else "never"
            shown = " ".join(f"{m}:{value:.2f}" for m, value in ratios.items())
            print(f"{type:7} {n} x {k} against {exact}: bf16 {measured}, auto {table}; {shown}", flush=True)


if __name__ == "__main__":
    main()
