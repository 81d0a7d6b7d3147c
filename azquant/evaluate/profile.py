"""Where the time of a step goes: seconds per kind of op, for a prompt and for tokens written one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from azquant.engine import load
from azquant.errors import ArgumentError

__all__ = ["OpTime", "StepProfile", "profile"]


@dataclass(frozen=True)
class OpTime:
    """All ops of one kind; matrices of one shape and type are a kind."""

    name: str
    count: int
    """Ops of this kind in a step."""
    seconds: float
    """Of one step, all of them together."""


@dataclass(frozen=True)
class StepProfile:
    """The ops of a step, the slowest first."""

    name: str
    """As in :class:`BenchRow`: ``pp512``, ``tg128``, ``tg128 x16``."""
    seconds: float
    """Of one step, Python included."""
    ops: tuple[OpTime, ...]


def profile(
    path: str | PathLike[str],
    *,
    prompt_tokens: int = 512,
    answer_tokens: int = 128,
    batches: tuple[int, ...] = (1, 16),
    repeats: int = 5,
    compute: str = "auto",
    kv_type: str = "f16",
) -> list[StepProfile]:
    """The profile of a prompt, then of each of ``batches``: the run of median length of ``repeats``.

    Lengths are capped at the model's context; ``compute`` and ``kv_type`` are :func:`azquant.load`'s.
    Raises what that raises, ArgumentError.
    """
    if min(prompt_tokens, answer_tokens, repeats, *batches) < 1:
        raise ArgumentError("lengths, batches and repeats must be at least 1")
    model = load(path, compute=compute, kv_type=kv_type)
    prompt_tokens = min(prompt_tokens, model.context_length)
    answer_tokens = min(answer_tokens, model.context_length - 1)
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, model.context_length).astype(np.int32)

    def measure(name: str, n_seq: int, n_ctx: int, steps: Callable[[Any], int]) -> StepProfile:
        session, runs = model.session(n_seq, n_ctx), []
        for _ in range(repeats + 1):
            session.reset()
            with session.measured() as seconds:
                begin = time.perf_counter()
                n = steps(session)
                runs.append(((time.perf_counter() - begin) / n, seconds / n))
        wall, seconds = sorted(runs[1:], key=lambda run: run[0])[repeats // 2]
        found: dict[str, list[float]] = {}
        for op, spent in zip(session.ops, seconds.tolist(), strict=True):
            kind = op.kind
            if op.kind == "linear" and op.w is not None:
                kind = f"linear {op.w.shape[0]} x {op.w.shape[1]}"
            elif op.experts:
                inner, width = op.experts[0][0].shape
                kind = f"experts {op.n_used} of {len(op.experts)}, {inner} x {width}"
            found.setdefault(kind, []).append(spent)
        ops = [OpTime(kind, len(spent), sum(spent)) for kind, spent in found.items()]
        return StepProfile(name, wall, tuple(sorted(ops, key=lambda op: -op.seconds)))

    def prefill(session: Any) -> int:
        session.feed([(0, tokens[:prompt_tokens])])
        return 1

    def decode(session: Any) -> int:
        for at in range(answer_tokens):
            session.feed([(i, tokens[at : at + 1]) for i in range(len(session.lengths))], copy=False)
        return answer_tokens

    found = [measure(f"pp{prompt_tokens}", 1, prompt_tokens, prefill)]
    for batch in batches:
        name = f"tg{answer_tokens}" + (f" x{batch}" if batch > 1 else "")
        found.append(measure(name, batch, answer_tokens, decode))
    return found
