"""What azquant costs over ``import numpy`` until it can compute: whole processes, and the difference.

``import azquant`` alone imports nothing that it may not need, not even NumPy; the row ``azquant`` is the
import and the first question to the kernels.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Any

import pytest

MEASURED = (
    "from time import perf_counter as now; import numpy; start = now(); import azquant; azquant.QTensor; "
    "azquant.isas(); print(now() - start)"
)
ROUNDS = 15


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.benchmark(group="import (process)")
@pytest.mark.parametrize("module", ["nothing", "numpy", "azquant"])
def bench_import(benchmark: Any, module: str) -> None:
    code = {"nothing": "pass", "azquant": "import azquant; azquant.QTensor; azquant.isas()"}.get(
        module, f"import {module}"
    )
    benchmark.pedantic(run, args=(code,), rounds=ROUNDS, warmup_rounds=2)
    if module == "azquant":
        benchmark.extra_info["ms over numpy"] = round(
            median(float(run(MEASURED)) for _ in range(ROUNDS)) * 1e3, 2
        )
