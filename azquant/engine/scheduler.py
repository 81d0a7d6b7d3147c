"""Continuous batching: one worker steps all requests of a model; they join and leave between steps."""

from __future__ import annotations

import atexit
import os
import threading
from array import array
from collections import deque
from typing import Any
from weakref import WeakSet

from azquant.engine.request import Request
from azquant.engine.session import STEP_TOKENS
from azquant.engine.slots import Slots
from azquant.errors import ArgumentError
from azquant.program import StepArrays

__all__ = ["MIXED_STEP_TOKENS", "Scheduler", "share_out"]

MIXED_STEP_TOKENS = 64
"""Most tokens in a step while some answers are being written: a long prompt then delays each next token of
the others by a step of this size, not of STEP_TOKENS. The kernels are near their full speed from here on."""


_schedulers: WeakSet[Scheduler] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Python must not end under a worker that computes."""
    for scheduler in list(_schedulers):
        scheduler.close()


def _forget_all() -> None:
    """After a fork there are no workers, and their locks may be held by nobody for ever."""
    global _schedulers
    _schedulers = WeakSet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def share_out(waiting: list[int], budget: int) -> list[int]:
    """How many of each request's ``waiting`` tokens (>= 1) go into a step of about ``budget`` tokens.

    Everybody gets an equal share, and what the short ones leave goes to the longer ones: a request that
    writes (1 token waiting) is in every step, a short prompt is soon done, and a long one always moves on.
    """
    shares = [0] * len(waiting)
    left = budget
    for place, i in enumerate(sorted(range(len(waiting)), key=waiting.__getitem__)):
        shares[i] = min(waiting[i], max(1, left // (len(waiting) - place)))
        left = max(0, left - shares[i])
    return shares


class Scheduler:
    """The requests of one model, and the thread that computes them.

    ``program`` and ``kv`` (n_seq sequences of n_ctx positions) are used by the worker alone. The worker lives
    as long as there are requests; nothing of it is left while the model is idle, so an idle model can be
    forked, dropped, and outlived by nothing.
    """

    def __init__(self, program: Any, kv: Any, compute: str) -> None:
        self._program, self._kv, self._compute = program, kv, compute
        self._slots = Slots(kv.n_seq, kv.n_ctx, kv.copy)
        self._arrays = StepArrays(program.n_vocab)
        self._lock = threading.Lock()  # guards the next three
        self._pending: deque[Request] = deque()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._active: list[Request] = []  # the worker's
        _schedulers.add(self)

    @property
    def n_ctx(self) -> int:
        """Most positions of a request."""
        n: int = self._kv.n_ctx
        return n

    def submit(self, *requests: Request) -> None:
        """Queues requests; all of them are there before the next step begins."""
        with self._lock:
            if self._closed:
                raise ArgumentError("the model was closed; load it again")
            self._pending.extend(requests)
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, name="azquant-scheduler", daemon=True)
                self._worker.start()

    def close(self) -> None:
        """Cancels every request and waits until the worker has ended (the step it is in, at most)."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    # ---- the worker ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
        except BaseException as error:  # nobody may wait forever, whatever happened
            with self._lock:
                stranded = [*self._active, *self._pending]
                for request in self._active:
                    self._leave(request)
                self._active = []
                self._pending.clear()
                self._worker = None
            for request in stranded:
                request.fail(error)
            if not isinstance(error, Exception):
                raise

    def _admit(self) -> bool:
        """Lets cancelled requests go and waiting ones in. False, with the worker gone, when none is left."""
        for request in self._active:
            if request.cancelled or self._closed:
                self._leave(request)
                request.finish("cancelled")
        self._active = [request for request in self._active if request.slot is not None]
        dropped: list[Request] = []
        entering: list[Request] = []
        with self._lock:
            for request in list(self._pending):
                if request.cancelled or self._closed:
                    dropped.append(request)
                elif len(entering) < self._slots.free():
                    entering.append(request)
                else:
                    break
            for _ in (*dropped, *entering):
                self._pending.popleft()
            if not self._active and not entering and not self._pending:
                self._worker = None
        for request in dropped:
            request.finish("cancelled")
        for request in entering:
            request.slot = self._slots.take(request.prompt)
            request.cached = request.slot.length
            request.waiting = request.prompt[request.cached :]
            self._active.append(request)
        return bool(self._active)

    def _step(self) -> None:
        """Computes the next tokens of every request, and chooses one for each whose tokens are all in."""
        active = self._active
        shares = [request.n_waiting for request in active]
        writing = shares.count(1)
        if writing < len(active):
            shares = share_out(shares, max(MIXED_STEP_TOKENS, 2 * writing) if writing else STEP_TOKENS)
        arrays, n_tokens = self._arrays, sum(shares)
        arrays.reserve(n_tokens, len(active))
        ready = [request for request, share in zip(active, shares, strict=True) if share == request.n_waiting]
        self._fill(shares)
        choose = any(request.greedy for request in ready)
        self._program.run(self._kv, self._compute, arrays, n_tokens, len(ready), choose=choose)
        for request, share in zip(active, shares, strict=True):
            assert request.slot is not None
            if request.last is not None:
                request.slot.append(request.last)
            else:
                request.slot.extend(request.waiting[:share])
                request.waiting = request.waiting[share:]
        likeliest = arrays.likeliest[: len(ready)].tolist()
        for row, request in enumerate(ready):
            self._advance(request, arrays.row(row), likeliest[row])

    def _fill(self, shares: list[int]) -> None:
        """The next step: the first ``shares`` of each request's waiting tokens."""
        tokens, sequence, position = self._arrays.tokens, self._arrays.sequence, self._arrays.position
        at = row = 0
        for request, share in zip(self._active, shares, strict=True):
            slot = request.slot
            assert slot is not None
            if request.last is not None:
                tokens[at], sequence[at], position[at] = request.last, slot.index, slot.length
            else:
                tokens[at : at + share] = request.waiting[:share]
                sequence[at : at + share] = array("i", [slot.index]) * share
                position[at : at + share] = array("i", range(slot.length, slot.length + share))
            at += share
            if share == request.n_waiting:
                self._arrays.out_rows[row] = at - 1
                row += 1

    def _advance(self, request: Request, logits: Any, likeliest: int) -> None:
        try:
            request.advance(logits, likeliest, self.n_ctx)
        except Exception as error:  # this request's own: a forbidden vocabulary, a token without text
            request.fail(error)
        if request.done:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        if request.slot is not None:
            self._slots.give_back(request.slot)
            request.slot = None
