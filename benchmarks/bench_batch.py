"""16 concurrent requests of mixed length (GPT-2 134M, Q4_0), together and one after another; tokens/s.

Two mixes: ``chat`` has answers about twice as long as prompts, as conversations with assistants have them;
``prompts`` is the other way round, where most of the work is reading and batching has less to share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_model  # beside this file

import azquant as aq

REQUESTS = 16
MIXES = {"chat": ((4, 96), (40, 160)), "prompts": ((4, 96), (8, 48))}
"""Shortest and longest prompt, and answer; uniform between."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gpt2-134m.gguf"
    write_model("gpt2-134m", path, context=256)
    return path


def requests(mix: str) -> list[tuple[list[int], int]]:
    """Prompts and the lengths of their answers: the same ones every time."""
    random = np.random.default_rng(0)
    (shortest, longest), answers = MIXES[mix]
    return [
        (random.integers(0, 32000, random.integers(shortest, longest + 1)).tolist(), int(length))
        for length in random.integers(answers[0], answers[1] + 1, REQUESTS)
    ]


@pytest.mark.parametrize("how", ["one after another", "together"])
@pytest.mark.parametrize("mix", MIXES)
def bench_batch(benchmark: Any, backend: str, path: Path, mix: str, how: str) -> None:
    if backend in ("scalar", "numpy"):
        pytest.skip("takes minutes")
    benchmark.group = f"batch of {REQUESTS} requests, {mix} {backend}"
    work = requests(mix)

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
