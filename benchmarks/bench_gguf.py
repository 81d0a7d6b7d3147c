"""GGUF files: opening a large vocabulary, its tokens as a list, and writing against ``cp``.

``python -m pytest benchmarks/bench_gguf.py -o python_files='bench_*.py'``. Rows of one group are ratios of
one run. gguf-py takes half a minute a row: ``-k "not gguf_py"`` leaves it out. Writing syncs to the disk,
which ``cp`` does not: ``cp and sync`` is the fair opponent, plain ``cp`` a stricter one. Verification, which
reads everything back, has a row of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from azquant import _backend
from azquant.gguf import GGUFArray, TensorSpec, ValueType, keys, open_gguf, write_gguf
from azquant.types import get_type

VOCABULARIES = {"150k": 150_000, "262k": 262_144}
FILE_BYTES = 256 << 20
READERS = ["c", "numpy", "gguf_py"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a vocabulary as large models have it: tokens, scores, types and merges; no tensors."""
    count = VOCABULARIES[request.param]
    tokens = [f"▁ə{i:x}" if i % 3 == 0 else f"tok{i}" for i in range(count)]
    path = tmp_path_factory.mktemp("vocabulary") / f"{request.param}.gguf"
    metadata = {
        keys.ARCHITECTURE: keys.string("llama"),
        keys.TOKENS: keys.array(ValueType.STRING, tokens),
        keys.SCORES: keys.array(ValueType.FLOAT32, np.zeros(count, np.float32)),
        keys.TOKEN_TYPE: keys.array(ValueType.INT32, np.ones(count, np.int32)),
        keys.MERGES: keys.array(ValueType.STRING, [f"{a} {b}" for a, b in pairwise(tokens)]),
    }
    write_gguf(path, metadata, [], lambda spec: [])
    return path


@pytest.fixture
def use_backend() -> Iterator[Callable[[str], None]]:
    """Chooses the backend for the rest of the test."""
    with pytest.MonkeyPatch.context() as patch:

        def choose(name: str) -> None:
            patch.setenv("AZQUANT_BACKEND", name)
            _backend.kernels.cache_clear()
            _backend.kernels()

        yield choose
    _backend.kernels.cache_clear()


def reader(name: str, use_backend: Callable[[str], None]) -> Callable[[Path], Any]:
    if name != "gguf_py":
        use_backend(name)
        return open_gguf
    gguf = pytest.importorskip("gguf")
    return lambda path: gguf.GGUFReader(path)


def rounds(name: str) -> dict[str, int]:
    return {"rounds": 1} if name == "gguf_py" else {"rounds": 15, "warmup_rounds": 1}


@pytest.mark.filterwarnings("ignore:azquant runs on NumPy")
@pytest.mark.parametrize("name", READERS)
def test_open(benchmark: Any, vocabulary: Path, name: str, use_backend: Callable[[str], None]) -> None:
    benchmark.group = f"open a {vocabulary.stem} vocabulary"
    benchmark.pedantic(reader(name, use_backend), (vocabulary,), **rounds(name))


@pytest.mark.filterwarnings("ignore:azquant runs on NumPy")
@pytest.mark.parametrize("name", READERS)
def test_tokens_to_list(
    benchmark: Any, vocabulary: Path, name: str, use_backend: Callable[[str], None]
) -> None:
    """From an open file, whose array has decoded nothing yet."""
    benchmark.group = f"all tokens of a {vocabulary.stem} vocabulary as a list"
    file = reader(name, use_backend)(vocabulary)

    def ours() -> list[str]:
        tokens = file.metadata[keys.TOKENS]
        assert isinstance(tokens, GGUFArray)
        return tokens.tolist()

    def theirs() -> list[str]:
        content: list[str] = file.get_field(keys.TOKENS).contents()
        return content

    tokens = benchmark.pedantic(theirs if name == "gguf_py" else ours, **rounds(name))
    assert len(tokens) == VOCABULARIES[vocabulary.stem]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 256 MiB in 32 tensors, in the page cache."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    piece = np.random.default_rng(0).integers(0, 256, FILE_BYTES // 32, np.uint8)
    specs = [TensorSpec(f"blk.{i}.ffn_up.weight", (piece.size,), get_type("i8")) for i in range(32)]
    write_gguf(path, {}, specs, lambda spec: [piece], verify=False)
    return path


@pytest.mark.parametrize("how", ["cp", "cp and sync", "azquant", "azquant, verified"])
def test_write(benchmark: Any, large: Path, how: str) -> None:
    """A copy of a file: its tensors written anew, against ``cp``."""
    benchmark.group = f"write {FILE_BYTES >> 20} MiB"
    target = large.with_name("copy.gguf")

    def copy() -> None:
        if how.startswith("cp"):
            subprocess.run([shutil.which("cp") or "cp", "--reflink=never", large, target], check=True)
            if how == "cp and sync":
                with target.open("rb") as file:
                    os.fsync(file.fileno())
            return
        with open_gguf(large) as file:
            specs = [TensorSpec(t.name, t.shape, t.type) for t in file.tensors.values()]
            write_gguf(
                target, {}, specs, lambda spec: [file.tensors[spec.name].data], verify=how != "azquant"
            )

    def clean() -> None:
        target.unlink(missing_ok=True)

    benchmark.pedantic(copy, setup=clean, rounds=5, warmup_rounds=1)
    benchmark.extra_info["GB/s"] = round(FILE_BYTES / benchmark.stats.stats.median / 1e9, 3)
    assert target.stat().st_size == large.stat().st_size
    clean()
