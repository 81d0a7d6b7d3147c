"""Making tensor data in one thread while another writes it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from azquant.errors import InternalError
from azquant.gguf import TensorSpec

__all__ = ["Ahead"]

_DEPTH = 3
"""Bands that may wait to be written."""


class Ahead:
    """Makes the bands of ``specs``, in their order, a few ahead of :meth:`data`, which hands them out.

    Use it in a ``with``, which ends its thread. An error of ``make`` is raised by :meth:`data`.
    """

    def __init__(self, specs: Sequence[TensorSpec], make: Callable[[TensorSpec], Iterable[Any]]) -> None:
        self._specs, self._make = list(specs), make
        self._made: queue.Queue[tuple[str, Any, BaseException | None]] = queue.Queue(_DEPTH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="azquant-ahead", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._made.get(timeout=0.05)  # makes room for a thread that waits to put
        self._thread.join()

    def _run(self) -> None:
        for spec in self._specs:
            try:
                for band in self._make(spec):
                    if self._stopped.is_set():
                        return
                    self._made.put((spec.name, band, None))
                self._made.put((spec.name, None, None))
            except BaseException as error:  # raised again where the data are asked for
                self._made.put((spec.name, None, error))
                return

    def data(self, spec: TensorSpec) -> Iterator[Any]:
        """The bands of ``spec``; to be asked for in the order given."""
        while True:
            name, band, error = self._made.get()
            if error is not None:
                raise error
            if name != spec.name:
                raise InternalError(f"tensor {spec.name} was asked for, {name} was made")
            if band is None:
                return
            yield band
