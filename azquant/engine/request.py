"""One answer in the making: what the scheduler fills in and the caller waits for."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from azquant._lazy import np
from azquant.engine.options import Options, check_stops
from azquant.engine.sampling import check_top, log_softmax
from azquant.engine.slots import Slot
from azquant.engine.stopping import StopFinder
from azquant.tokenizer import StreamDecoder

__all__ = ["Completion", "Request", "TokenLogprob"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, the logarithm of its probability, and the likeliest tokens at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), likeliest first."""


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    tokens: list[int]
    """The ids that were chosen, with those that completed a stop string, without an end or stop token."""
    text: str | None
    """The answer as text, ending before a stop string; ``None`` for a prompt of ids without ``stop``."""
    finish_reason: str
    """``"stop"``: an end token, a stop token or a stop string; ``"length"``: max_tokens; ``"context"``: every
    position of the context is used; ``"cancelled"``."""
    stop: str | int | None
    """The stop string, or the id of the token, that ended it."""
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were in the KV cache already and were not computed again."""
    seconds: float
    """From submission to end, waiting for a free slot included."""
    seconds_to_first: float | None
    """From submission to the first token; ``None`` where there is none."""
    logprobs: list[TokenLogprob] | None = field(default=None, repr=False)
    """One for each of ``tokens``; ``None`` unless asked for."""


class Request:
    """What the scheduler knows of one answer, and the pieces that a waiting caller reads.

    The worker alone writes; whatever callers read or wait for is guarded by ``changed``, which tells of every
    token, and ``ended``, which shares its lock and spares those who wait for the end. ``cancelled`` is a flag
    without a lock, so that it can be set from anywhere: a destructor, a signal handler.
    """

    def __init__(
        self,
        prompt: array[int],
        options: Options,
        n_vocab: int,
        end_ids: frozenset[int],
        decoder: StreamDecoder | None,
    ) -> None:
        self.prompt, self.options = prompt, options
        self.end_ids = end_ids.union(int(token) for token in options.stop_tokens)
        self.chooser = options.chooser(n_vocab, prompt.tolist() if options.repetition_penalty != 1 else ())
        self.greedy = self.chooser.takes_likeliest
        self.decoder = decoder
        self.finder = StopFinder(check_stops(options.stop))
        # Only the scheduler's worker uses these.
        self.slot: Slot | None = None
        self.waiting: array[int] = prompt  # tokens of the prompt that are not in the cache yet
        self.last: int | None = None  # the token that was chosen last, not in the cache yet either
        # Shared with the callers.
        self.cancelled = False
        self.changed = threading.Condition()
        self.ended = threading.Condition(self.changed._lock)  # type: ignore[attr-defined]
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.cached = 0
        self.stop: str | int | None = None
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.begun = perf_counter()
        self.first_at: float | None = None
        self.ended_at = self.begun
        self._wakers: list[Callable[[], None]] = []

    # ---- the worker's side -----------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.waiting) if self.last is None else 1

    def advance(self, logits: memoryview[float], likeliest: int, n_ctx: int) -> None:
        """Chooses the next token from ``logits``, float32 (vocab,); finishes the answer where it ends there.

        ``likeliest``, the first of the largest logits, counts where the request is ``greedy``.
        """
        if self.greedy:
            check_top(logits[likeliest])
            token = likeliest
        else:
            token = self.chooser.choose(np.asarray(logits))
        if token in self.end_ids:
            self.finish("stop", stop=token)
            return
        logprob = self._logprob(logits, token)
        piece = "" if self.decoder is None else self.finder.push(self.decoder.push(token))
        with self.changed:
            self.tokens.append(token)
            self.first_at = self.first_at or perf_counter()
            if logprob is not None:
                self.logprobs.append(logprob)
            if piece:
                self.pieces.append(piece)
            self._wake()
        self.last = token
        if self.finder.found is not None:
            self.finish("stop", stop=self.finder.found)
        elif len(self.tokens) >= self.options.max_tokens:
            self.finish("length")
        elif len(self.prompt) + len(self.tokens) > n_ctx:
            self.finish("context")

    def _logprob(self, logits: memoryview[float], token: int) -> TokenLogprob | None:
        n = self.options.logprobs
        if n is None:
            return None
        values = log_softmax(np.asarray(logits))
        likeliest = np.argsort(-values, kind="stable")[:n]
        return TokenLogprob(token, float(values[token]), tuple((int(i), float(values[i])) for i in likeliest))

    def finish(self, reason: str, *, stop: str | int | None = None) -> None:
        """Gives out the text that was held back, and lets the callers go."""
        rest = ""
        if self.decoder is not None and self.finder.found is None:
            rest = self.finder.push(self.decoder.flush())  # what is held may complete a stop string
            if self.finder.found is not None:
                reason, stop = "stop", self.finder.found
            rest += self.finder.flush()
        with self.changed:
            if rest:
                self.pieces.append(rest)
            self.ended_at = perf_counter()
            self.finish_reason, self.stop = reason, stop
            self._wake()
            self.ended.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ends the answer with an exception, which every caller that waits for it gets."""
        with self.changed:
            self.error, self.finish_reason = error, "error"
            self._wake()
            self.ended.notify_all()

    def _wake(self) -> None:
        self.changed.notify_all()
        for waker in self._wakers:
            waker()

    # ---- the callers' side -----------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def wait(self, timeout: float) -> bool:
        """Waits for the end of the answer, at most ``timeout`` seconds; whether it has come."""
        with self.ended:
            return self.ended.wait_for(lambda: self.done, timeout)

    def wait_for_item(self, as_text: bool, number: int, timeout: float) -> None:
        """Waits until there is an item with this number (see :meth:`items`), or the end, or ``timeout``."""
        items: list[Any] = self.pieces if as_text else self.tokens
        with self.changed:
            self.changed.wait_for(lambda: self.done or len(items) > number, timeout)

    def add_waker(self, waker: Callable[[], None]) -> None:
        """``waker`` is called, in the worker's thread, whenever there is news."""
        with self.changed:
            self._wakers.append(waker)

    def remove_waker(self, waker: Callable[[], None]) -> None:
        """Undoes :meth:`add_waker`."""
        with self.changed:
            self._wakers.remove(waker)

    def items(self, as_text: bool, start: int) -> list[Any]:
        """The pieces of text, or the token ids, from number ``start`` on."""
        with self.changed:
            return list(self.pieces[start:] if as_text else self.tokens[start:])

    def completion(self) -> Completion:
        """The finished answer. Raises the error it ended with."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None
        return Completion(
            tokens=list(self.tokens),
            text=None if self.decoder is None else "".join(self.pieces),
            finish_reason=self.finish_reason,
            stop=self.stop,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            seconds=self.ended_at - self.begun,
            seconds_to_first=None if self.first_at is None else self.first_at - self.begun,
            logprobs=None if self.options.logprobs is None else list(self.logprobs),
        )
