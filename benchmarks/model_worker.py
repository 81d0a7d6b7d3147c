"""The azquant side of compare_models.py: a process that holds one model and measures what it is told.

    python benchmarks/model_worker.py MODEL THREADS          jobs as lines of JSON, answers likewise
    python benchmarks/model_worker.py MODEL THREADS first    one token from text, then the end
    python benchmarks/model_worker.py MODEL THREADS whole    512 tokens in, 128 out, then the end

AZQUANT_ISA and AZQUANT_BACKEND choose the kernels.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import azquant as aq

SEQUENCES = 16
PROMPT, ANSWER = 512, 128
"""Tokens of the run whose memory is measured, and of llama-bench's for comparison."""


def first_token(path: str) -> None:
    """Loads and writes one token: the shortest thing a user can do with a model."""
    with aq.load(path) as model:
        model.generate("Salam", max_tokens=1)


def whole_request(path: str) -> None:
    """A long prompt and an answer; prints the peak of the resident memory and the cache's share."""
    with aq.load(path, n_seq=1) as model:
        model.generate([i % 1000 for i in range(PROMPT)], max_tokens=ANSWER)
        spec = model._spec
        per_position = 4 * spec.n_layer * spec.n_head_kv * spec.head_dim
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak, "kv": per_position * (PROMPT + ANSWER)}))


class Worker:
    """One loaded model. Every job gives seconds, or what its docstring says."""

    def __init__(self, path: str) -> None:
        import numpy as np

        self.model = aq.load(path, n_seq=SEQUENCES)
        most = self.model.context_length + 1
        self.tokens = np.random.default_rng(0).integers(0, self.model.n_vocab, most).astype(np.int32)

    def prefill(self, tokens: int) -> float:
        """A prompt of so many tokens, the logits of its last."""
        session = self.model.session(1, tokens)
        begin = time.perf_counter()
        session.feed([(0, self.tokens[:tokens])])
        return time.perf_counter() - begin

    def decode(self, tokens: int, batch: int, prompt: int) -> float:
        """So many steps of one token for each of ``batch`` sequences, after a prompt."""
        session = self.model.session(batch, prompt + tokens)
        session.feed([(i, self.tokens[:prompt]) for i in range(batch)])
        begin = time.perf_counter()
        for at in range(prompt, prompt + tokens):
            session.feed([(i, self.tokens[at : at + 1]) for i in range(batch)], copy=False)
        return time.perf_counter() - begin

    def schedule(self, tokens: int, batch: int, prompt: int) -> float:
        """The same by submit(): greedy sampling, streams and threads included. From first to last token."""
        prompts = [(self.tokens[:prompt] + i) % self.model.n_vocab for i in range(batch)]
        handles = [self.model.submit(p.tolist(), max_tokens=tokens) for p in prompts]
        done = [handle.result() for handle in handles]
        written = sum(len(answer.tokens) - 1 for answer in done)
        first = max(answer.seconds_to_first or 0.0 for answer in done)
        last = max(answer.seconds for answer in done)
        return (last - first) * tokens * batch / written

    def positions(self, tokens: int) -> list[float]:
        """Seconds of each step of one sequence, from an empty cache to ``tokens`` positions."""
        session, seconds = self.model.session(1, tokens), []
        for at in range(tokens):
            begin = time.perf_counter()
            session.feed([(0, self.tokens[at : at + 1])], copy=False)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def limit(self) -> dict[str, Any]:
        """What one decode step reads, and how fast memory gives it."""
        from azquant import limits

        size = self.model.step_bytes
        spec = self.model._spec
        position = 4 * spec.n_layer * spec.n_head_kv * spec.head_dim
        found = {"step_bytes": size, "stream_read": limits.stream_read(size), "position_bytes": position}
        return {**found, "isa": aq.active_isa(), "backend": aq.backend()}


def main() -> None:
    """Loads, then answers jobs until its input ends."""
    warnings.simplefilter("ignore")
    path, threads = sys.argv[1], int(sys.argv[2])
    aq.set_num_threads(threads)
    if sys.argv[3:] == ["first"]:
        first_token(path)
        return
    if sys.argv[3:] == ["whole"]:
        whole_request(path)
        return
    worker = Worker(path)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(getattr(worker, job.pop("do"))(**job)), flush=True)


if __name__ == "__main__":
    main()
