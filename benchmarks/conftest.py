"""What the benchmarks share: the backends, rates beside times, and the machine's description."""

from __future__ import annotations

import platform
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import azquant as aq
from azquant import _backend, cpu

FEATURES = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)
"""Processor flags that the kernels ask for, as /proc/cpuinfo spells them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--threads",
        type=int,
        default=0,
        help="threads of the C kernels (default: what azquant chooses itself)",
    )


# ---- backends ----------------------------------------------------------------------------------------


def _backends() -> list[str]:
    try:
        from azquant import _native
    except ImportError:
        return ["numpy"]
    return [*(name for name, usable in _native.isas() if usable), "numpy"]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA that this machine runs, then NumPy; azquant computes with it."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZQUANT_BACKEND", "numpy" if name == "numpy" else "c")
        _backend.kernels.cache_clear()
        cpu._prepare.cache_clear()
        threads = request.config.getoption("--threads")
        aq.set_num_threads(threads or cpu.default_threads())
        if name != "numpy":
            aq.use_isa(name)
        yield name
    _backend.kernels.cache_clear()
    cpu._prepare.cache_clear()


# ---- rates -------------------------------------------------------------------------------------------


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., Any]:
    """Times a call and notes its rates: ``measure(fn, nbytes=moved, ops=done)`` adds GB/s and GOP/s."""

    def run(call: Callable[[], Any], *, nbytes: int = 0, ops: int = 0) -> Any:
        result = benchmark(call)
        if benchmark.stats is not None:  # None with --benchmark-disable
            seconds = benchmark.stats.stats.median
            for unit, amount in (("GB/s", nbytes), ("GOP/s", ops)):
                if amount:
                    benchmark.extra_info[unit] = round(amount / seconds / 1e9, 3)
        return result

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The rates, which pytest-benchmark's own table leaves out."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row for row in session.benchmarks if row.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("rates (of the median)")
    for row in sorted(rows, key=lambda row: str(row.fullname)):
        rates = "  ".join(f"{value:10.2f} {unit}" for unit, value in row.extra_info.items())
        terminalreporter.line(f"{row.name:60}{rates}")


# ---- the machine -------------------------------------------------------------------------------------


def _cpu() -> tuple[str, list[str]]:
    """Model name and the features of FEATURES that it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.machine()), [name for name in FEATURES if name in flags]


def _compiler() -> str:
    """The C compiler that builds extensions here, by its first line."""
    command = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    try:
        return subprocess.run(
            [command, "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def machine(config: pytest.Config) -> dict[str, str]:
    """What a number means nothing without."""
    name, features = _cpu()
    threads = config.getoption("--threads") or cpu.default_threads()
    return {
        "cpu": name,
        "features": " ".join(features),
        "threads": str(threads),
        "system": platform.platform(),
        "compiler": _compiler(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "azquant": aq.__version__,
        "isas": " ".join(_backends()),
    }


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"{name}: {value}" for name, value in machine(config).items()]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Puts the same lines into the JSON."""
    machine_info["azquant"] = machine(config)
