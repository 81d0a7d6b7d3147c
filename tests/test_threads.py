"""Threads and instruction sets: defaults, settings, the environment, fork, and many callers at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import azquant as aq
from azquant.cpu import default_threads
from azquant.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("needs_c")

Run = Callable[..., Any]

PRODUCT = """
import numpy as np, azquant as aq
x = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
w = np.random.default_rng(1).normal(size=(300, 512)).astype(np.float32)
y = aq.matmul(x, aq.quantize(w), "int8")
print(int(np.bitwise_xor.reduce(y.view(np.uint32).ravel() * np.arange(1, y.size + 1, dtype=np.uint32))))
"""
"""Prints a number that stands for every bit of a product."""


def product() -> tuple[Any, Any]:
    x = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
    return x, aq.quantize(np.random.default_rng(1).normal(size=(300, 512)).astype(np.float32))


# ---- the default -------------------------------------------------------------------------------------


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pretends that this process may run on 8 processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", 8),
        ("400000 100000\n", 4),
        ("250000 100000\n", 2),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("100000 0\n", 8),
        ("nonsense\n", 8),
        ("a b\n", 8),
        ("", 8),
    ],
)
def test_quota_of_control_group_v2(tmp_path: Path, processors: int, text: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert default_threads(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3), ("20000", 1), ("x", 8), ("0", 8)])
def test_quota_of_control_group_v1(tmp_path: Path, processors: int, quota: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert default_threads(tmp_path) == expected


def test_without_control_groups_affinity_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert default_threads(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads(str(tmp_path / "missing")) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads(tmp_path) == 1


def test_the_default_is_what_a_fresh_process_uses(run_python: Run) -> None:
    done = run_python("import azquant as aq; print(aq.num_threads())")
    assert int(done.stdout) == default_threads()


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed")
def test_affinity_is_seen(run_python: Run) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    done = run_python("import azquant as aq; print(aq.num_threads())", command=("taskset", "-c", cpu))
    assert int(done.stdout) == 1


# ---- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, 1.5, 2.0, "2", None, True])
def test_a_number_of_threads_is_a_whole_one_above_zero(isa: str, n: object) -> None:
    before = aq.num_threads()
    with pytest.raises(ArgumentError, match="whole number >= 1"):
        aq.set_num_threads(n)  # type: ignore[arg-type]
    assert aq.num_threads() == before


def test_set_num_threads_is_read_back(c_isa: str) -> None:
    for n in (1, 2, 7):
        aq.set_num_threads(n)
        assert aq.num_threads() == n
    aq.set_num_threads(10**30)  # clamped to what the pool holds
    assert 16 <= aq.num_threads() <= 4096


def test_threads_of_the_environment(run_python: Run) -> None:
    code = "import azquant as aq; print(aq.num_threads())"
    assert int(run_python(code, AZQUANT_THREADS="3").stdout) == 3
    assert int(run_python(code, AZQUANT_THREADS="").stdout) == default_threads()
    chosen = run_python(
        "import azquant as aq; aq.set_num_threads(2); print(aq.num_threads())", AZQUANT_THREADS="3"
    )
    assert int(chosen.stdout) == 2
    for wrong in ("0", "-2", "many", "1.5"):
        failed = run_python(code, AZQUANT_THREADS=wrong, check=False)
        assert failed.returncode == 1
        assert f"ArgumentError: AZQUANT_THREADS='{wrong}'" in failed.stderr


def test_every_isa_can_be_asked_for(c_isa: str, run_python: Run) -> None:
    assert aq.active_isa() == c_isa
    assert aq.backend() == "c"
    assert c_isa in aq.isas()
    done = run_python("import azquant as aq; print(aq.active_isa())", AZQUANT_ISA=c_isa)
    assert done.stdout.strip() == c_isa


def test_the_best_isa_is_the_default(c_isa: str, run_python: Run) -> None:
    done = run_python("import azquant as aq; print(aq.active_isa())")
    assert done.stdout.strip() == aq.isas()[-1]


def test_use_isa_overrules_the_environment(c_isa: str, run_python: Run) -> None:
    code = "import azquant as aq; aq.use_isa('scalar'); aq.num_threads(); print(aq.active_isa())"
    assert run_python(code, AZQUANT_ISA=c_isa).stdout.strip() == "scalar"


def test_isas_that_are_not_there_are_refused(isa: str, run_python: Run) -> None:
    for wrong in ("mmx", "", "AVX2", "neon"):
        with pytest.raises(ArgumentError, match="usable are"):
            aq.use_isa(wrong)
    failed = run_python("import azquant as aq; aq.quantize([[0.0] * 32])", AZQUANT_ISA="mmx", check=False)
    assert "ArgumentError: ISA 'mmx' is unknown" in failed.stderr


# ---- many callers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_eight_python_threads_at_once(c_isa: str, threads: int) -> None:
    x, w = product()
    expected = aq.matmul(x, w, "int8")
    aq.set_num_threads(threads)
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(10):
            fresh = aq.quantize(w.dequantize(), "f32")
            if not np.array_equal(aq.matmul(x, w, "int8"), expected):
                wrong.append("matmul")
            if not np.array_equal(fresh.dequantize(), w.dequantize()):
                wrong.append("quantize")

    callers = [threading.Thread(target=work) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_one_matrix_first_packed_by_eight_threads_at_once(c_isa: str) -> None:
    x, w = product()
    expected = aq.matmul(x, w, "int8")
    for _ in range(5):
        fresh = aq.QTensor(w.data, w.shape, "q4_0")
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda q: aq.matmul(x, q, "int8"), [fresh] * 8))
        assert all(np.array_equal(y, expected) for y in results)


def _child(queue: Any, data: Any, shape: tuple[int, int], x: Any) -> None:
    queue.put(aq.matmul(x, aq.QTensor(data, shape, "q4_0"), "int8"))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_computes(c_isa: str) -> None:
    x, w = product()
    aq.set_num_threads(4)
    expected = aq.matmul(x, w, "int8")  # the pool's threads exist now
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        queue = context.Queue()
        child = context.Process(target=_child, args=(queue, w.data, w.shape, x))
        child.start()
        assert np.array_equal(queue.get(timeout=60), expected)
        child.join(60)
        assert child.exitcode == 0
        queue.close()
    assert np.array_equal(aq.matmul(x, w, "int8"), expected)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed")
def test_four_threads_on_one_processor_give_the_same_bits(run_python: Run) -> None:
    expected = run_python(PRODUCT, AZQUANT_THREADS="1").stdout
    cpu = str(min(os.sched_getaffinity(0)))
    crowded = run_python(PRODUCT, AZQUANT_THREADS="4", command=("taskset", "-c", cpu)).stdout
    assert crowded == expected
