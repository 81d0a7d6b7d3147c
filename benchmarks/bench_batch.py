"""16 concurrent requests of mixed length (GPT-2 134M, Q4_0), together and one after another; tokens/s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_model  # beside this file

import azquant as aq

REQUESTS = 16
LONGEST_PROMPT = 96
LONGEST_ANSWER = 48


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gpt2-134m.gguf"
    write_model("gpt2-134m", path, context=256)
    return path


def requests() -> list[tuple[list[int], int]]:
    """Prompts of 4 to 96 tokens, answers of 8 to 48: the same ones every time."""
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 32000, random.integers(4, LONGEST_PROMPT + 1)).tolist(), int(length))
        for length in random.integers(8, LONGEST_ANSWER + 1, REQUESTS)
    ]


@pytest.mark.parametrize("how", ["one after another", "together"])
def bench_batch(benchmark: Any, backend: str, path: Path, how: str) -> None:
    if backend in ("scalar", "numpy"):
        pytest.skip("takes minutes")
    benchmark.group = f"batch of {REQUESTS} requests {backend}"
    work = requests()

    def run(model: Any) -> None:
        if how == "together":
            handles = [model.submit(prompt, max_tokens=n) for prompt, n in work]
            assert [len(handle.result().tokens) for handle in handles] == [n for _, n in work]
        else:
            assert [len(model.generate(prompt, max_tokens=n)) for prompt, n in work] == [n for _, n in work]

    def fresh() -> tuple[tuple[Any], dict[str, Any]]:
        return (aq.load(path),), {}  # so that no round finds its prompts in the cache

    benchmark.pedantic(run, setup=fresh, rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:
        tokens = sum(len(prompt) + n for prompt, n in work)
        benchmark.extra_info["tokens/s"] = round(tokens / benchmark.stats.stats.median, 1)
