"""The handle of an answer that is being made."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

from azquant.engine.request import Completion, Request
from azquant.errors import ArgumentError, GenerationTimeout

__all__ = ["Generation"]

_POLL = 0.1
"""Seconds. Windows answers Ctrl-C only between waits; elsewhere a wait itself is interrupted."""


class Generation:
    """An answer that is being made; what :meth:`Model.submit` returns.

    Iterate over it (``for`` or ``async for``) to get the answer as it comes: pieces of text for a prompt that
    was text, token ids for one that was ids. Every iteration begins at the start of the answer. Or wait for
    all of it: :meth:`result`, or ``await``. An error of the computation is raised there. From any thread;
    when the last reference to it goes, the answer is cancelled.
    """

    def __init__(self, request: Request, as_text: bool) -> None:
        self._request, self._as_text = request, as_text
        self._process = os.getpid()

    def __del__(self) -> None:
        self._request.cancelled = True

    def __repr__(self) -> str:
        state = self._request.finish_reason or "running"
        return f"<Generation of {len(self._request.tokens)} tokens: {state}>"

    @property
    def done(self) -> bool:
        """Whether the answer is finished."""
        return self._request.done

    @property
    def tokens(self) -> list[int]:
        """The ids chosen so far."""
        with self._request.changed:
            return list(self._request.tokens)

    def cancel(self) -> None:
        """Ends the answer before the next step; what there is of it stays. May be called at any time."""
        self._request.cancelled = True

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the whole answer. Raises GenerationTimeout after ``timeout`` seconds; it goes on then."""
        if timeout is not None and not (
            isinstance(timeout, (int, float)) and 0 <= timeout < threading.TIMEOUT_MAX
        ):
            raise ArgumentError(f"timeout must be a number of seconds >= 0 or None, not {timeout!r}")
        self._check_process()
        while timeout is None and not self._request.wait(_POLL):
            pass
        if timeout is not None and not self._request.wait(timeout):
            raise GenerationTimeout(f"the answer is not finished after {timeout:g} seconds")
        return self._request.completion()

    def __iter__(self) -> Iterator[Any]:
        self._check_process()
        given = 0
        while True:
            done = self._request.done
            items = self._request.items(self._as_text, given)
            given += len(items)
            yield from items
            if items:
                continue
            if done:
                break
            self._request.wait_for_item(self._as_text, given, _POLL)
        self._request.completion()  # raises what went wrong

    async def __aiter__(self) -> AsyncIterator[Any]:
        import asyncio

        self._check_process()
        loop, news, given = asyncio.get_running_loop(), asyncio.Event(), 0

        def waker() -> None:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # the loop was closed and nobody will read on
                self._request.cancelled = True

        self._request.add_waker(waker)
        try:
            while True:
                news.clear()
                done = self._request.done
                items = self._request.items(self._as_text, given)
                given += len(items)
                for item in items:
                    yield item
                if items:
                    continue
                if done:
                    break
                await news.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._request.remove_waker(waker)
        self._request.completion()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._all().__await__()

    async def _all(self) -> Completion:
        async for _ in self:
            pass
        return self._request.completion()

    def _check_process(self) -> None:
        if os.getpid() != self._process and not self._request.done:
            raise ArgumentError(
                "this answer is being made in the parent process; submit the prompt again here"
            )
