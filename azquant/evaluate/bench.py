"""How fast a model runs here: prefill, decode, batches, load; and how near that is to what memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from azquant import limits
from azquant.cpu import active_isa, num_threads
from azquant.engine import MemoryNeeds, Model, load
from azquant.engine.session import Session
from azquant.errors import ArgumentError

__all__ = ["BenchReport", "BenchRow", "benchmark"]


@dataclass(frozen=True)
class BenchRow:
    """One measurement: the median over ``len(samples)`` runs."""

    name: str
    """``pp512``: a prompt of 512 tokens; ``tg128``: 128 tokens one by one; ``tg128 x4``: of 4 answers."""
    tokens: int
    """Tokens of one run, all sequences together."""
    tokens_per_second: float
    samples: tuple[float, ...]
    """Tokens per second of each run."""
    percent_of_limit: float | None = None
    """Of what memory allows: the bytes that a step must read, over the stream-read bandwidth. Decode only."""


@dataclass(frozen=True)
class BenchReport:
    """What :func:`benchmark` found."""

    path: str
    isa: str
    threads: int
    compute: str
    load_seconds: float
    memory: MemoryNeeds
    """What the model takes, stated before it was allocated."""
    peak_rss_bytes: int | None
    """Of this process so far; ``None`` where the system does not tell."""
    bytes_per_step: int
    """Weights that one decode step reads."""
    stream_read: float
    """Bytes per second, measured on a buffer of ``bytes_per_step``."""
    rows: tuple[BenchRow, ...]
    same_request: tuple[float, ...]
    """Seconds of one and the same request (32 tokens in, 32 out), asked again and again."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _peak_rss() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def _measure(run: Callable[[], float], tokens: int, repeats: int) -> tuple[float, tuple[float, ...]]:
    run()  # threads awake, pages there
    samples = tuple(tokens / run() for _ in range(repeats))
    return statistics.median(samples), samples


def _request(model: Model, prompt: np.ndarray[Any, np.dtype[np.int32]]) -> float:
    begin = time.perf_counter()
    model.generate(prompt.tolist(), max_tokens=32)
    return time.perf_counter() - begin


def benchmark(
    path: str | PathLike[str],
    *,
    prompt_tokens: int = 512,
    answer_tokens: int = 128,
    batches: tuple[int, ...] = (1, 4, 16),
    repeats: int = 5,
    compute: str = "auto",
    kv_type: str = "f16",
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measures the model at ``path`` with random tokens: prompts, and answers one and several at a time.

    Lengths are capped at the model's context; ``kv_type`` is :func:`azquant.load`'s. Raises what that raises,
    ArgumentError.
    """
    if min(prompt_tokens, answer_tokens, repeats, *batches) < 1:
        raise ArgumentError("lengths, batches and repeats must be at least 1")
    start = time.perf_counter()
    model = load(path, compute=compute, kv_type=kv_type)
    load_seconds = time.perf_counter() - start
    prompt_tokens = min(prompt_tokens, model.context_length)
    answer_tokens = min(answer_tokens, model.context_length - 1)
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, model.context_length).astype(np.int32)
    weights = model.step_bytes
    bandwidth = limits.stream_read(weights)

    def prefill(session: Session) -> float:
        session.reset()
        begin = time.perf_counter()
        session.feed([(0, tokens[:prompt_tokens])])
        return time.perf_counter() - begin

    def decode(session: Session) -> float:
        session.reset()
        batch = len(session.lengths)
        session.feed([(i, tokens[:1]) for i in range(batch)])
        begin = time.perf_counter()
        for at in range(answer_tokens):
            session.feed([(i, tokens[at : at + 1]) for i in range(batch)], copy=False)
        return time.perf_counter() - begin

    def note(name: str) -> None:
        if progress is not None:
            progress(name)

    rows = []
    note(f"pp{prompt_tokens}")
    session = model.session(1, prompt_tokens)
    found = _measure(lambda: prefill(session), prompt_tokens, repeats)
    rows.append(BenchRow(f"pp{prompt_tokens}", prompt_tokens, *found))
    for batch in batches:
        name = f"tg{answer_tokens}" + (f" x{batch}" if batch > 1 else "")
        note(name)
        total, session = batch * answer_tokens, model.session(batch, answer_tokens + 1)
        median, samples = _measure(lambda session=session: decode(session), total, repeats)  # type: ignore[misc]
        rows.append(BenchRow(name, total, median, samples, 100 * (median / batch) * weights / bandwidth))
    note("the same request again and again")
    with load(path, compute=compute, kv_type=kv_type) as asked:
        same = tuple(_request(asked, tokens[: min(32, model.context_length // 2)]) for _ in range(repeats))
    return BenchReport(
        path=str(path),
        isa=active_isa(),
        threads=num_threads(),
        compute=compute,
        load_seconds=load_seconds,
        memory=model.memory,
        peak_rss_bytes=_peak_rss(),
        bytes_per_step=weights,
        stream_read=bandwidth,
        rows=tuple(rows),
        same_request=same,
    )
