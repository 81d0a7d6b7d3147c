"""Filling a file with tensor data: made and written by several threads, synced and compared meanwhile."""

from __future__ import annotations

import os
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from azquant._backend import kernels
from azquant.errors import ArgumentError, GGUFError, InternalError, OutputError
from azquant.gguf.atomic import AtomicFile
from azquant.gguf.reader import open_descriptor

if TYPE_CHECKING:
    from azquant.gguf.writer import Layout, TensorSpec

__all__ = ["Piece", "fill"]

_HELD = 64 << 20
"""What the pieces being made may hold in memory together; one alone may hold more."""
_SETTLE = 16 << 20
"""How much is written before it is brought to the disk and compared, while more is made."""
_WINDOW = 1 << 20
"""Bytes read back at a time."""

Tell: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """A stretch of a tensor's data that is still to be made. Several are made at once, each by one thread."""

    nbytes: int
    make: Callable[[], Iterable[Any]]
    """Gives exactly ``nbytes`` bytes, in as many buffers as it likes."""
    memory: int = 0
    """About how many bytes are held while it is made."""


class _Check(NamedTuple):
    """What a stretch of the file must read back as (accidents are all that a CRC-32 must find)."""

    name: str
    at: int
    nbytes: int
    checksum: int


def fill(
    output: AtomicFile,
    layout: Layout,
    data: Callable[[TensorSpec], Iterable[Any]],
    *,
    verify: bool = True,
    sync: bool = True,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    late: Callable[[], Layout] | None = None,
) -> None:
    """Write ``layout`` and its data into ``output``, which is not published yet.

    ``late()``, asked after the data, gives the layout whose header shall stand there in the end. Of several
    pieces that fail, the first in the file is the one whose error is raised.
    """

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, layout.total)

    output.write(memoryview(layout.header), 0)
    at = len(layout.header)
    with _Filling(output, at, threads, verify and sync, tell) as filling:
        for spec in layout.specs:
            filling.add(spec, data)
            at += spec.nbytes
            padding = -at % layout.alignment
            output.write(memoryview(bytes(padding)), at)
            at += padding
            filling.at = at
        filling.finish()
        filling.settle()
        tell(at)
        if late is not None:
            size, layout = len(layout.header), late()
            if len(layout.header) != size:
                raise ArgumentError(
                    f"the late metadata take {len(layout.header)} bytes, not {size} as before"
                )
            output.write(memoryview(layout.header), 0)
        filling.wait()
    if sync:
        output.sync()
    if verify:
        _compare(output, [_Check("", 0, len(layout.header), zlib.crc32(layout.header))])
        _open_again(output, layout)


class _Filling:
    """Tensor data on its way into ``output`` from ``at`` on; use it in a ``with``, which ends its threads."""

    def __init__(self, output: AtomicFile, at: int, threads: int, settles: bool, tell: Tell) -> None:
        self.at = at
        """Where the next tensor begins."""
        self._checks: list[_Check] = []  # what was written but not settled yet, in the file's order
        self._output, self._threads, self._settles, self._tell = output, threads, settles, tell
        self._done = self._settled = at
        self._held = 0
        self._waiting: deque[tuple[Future[int], str, int, Piece]] = deque()
        self._settling: deque[Future[None]] = deque()
        self._stopped = threading.Event()
        self._makers = ThreadPoolExecutor(threads, "azquant-make", initializer=_start_maker)
        self._settler = ThreadPoolExecutor(1, "azquant-settle")

    def __enter__(self) -> _Filling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._makers.shutdown(wait=True, cancel_futures=True)
        self._settler.shutdown(wait=True, cancel_futures=True)

    def add(self, spec: TensorSpec, data: Callable[[TensorSpec], Iterable[Any]]) -> None:
        """Ask for the data of ``spec``: buffers are written here and now, pieces handed to the threads."""
        if not spec.nbytes:
            return
        pieces = data(spec)
        if isinstance(pieces, (bytes, bytearray, memoryview, np.ndarray)):
            pieces = (pieces,)  # iterating over these would give numbers or rows
        at, stop = self.at, self.at + spec.nbytes
        piece: Any
        for piece in pieces:
            self._tell(self._done)
            made = piece if isinstance(piece, Piece) else _bytes_of(piece, spec.name)
            size = made.nbytes
            if at + size > stop:
                raise ArgumentError(f"tensor {spec.name!r}: more data came than its {spec.nbytes} bytes")
            if isinstance(made, Piece):
                self._submit(spec.name, at, made)
            else:
                self.finish()
                self._written(spec.name, at, size, self._write(at, made, 0))
            at += size
        if at != stop:
            raise ArgumentError(f"tensor {spec.name!r}: {at - self.at} bytes of data came, not {spec.nbytes}")

    def finish(self) -> None:
        """Wait for every piece."""
        while self._waiting:
            self._take()

    def settle(self) -> None:
        """Begin to bring to the disk, and to compare, what was written since the last time."""
        if self._checks:
            checks, self._checks, self._settled = self._checks, [], self._done
            self._settling.append(self._settler.submit(_settle, self._output, checks))

    def wait(self) -> None:
        """Wait until all of that is done."""
        while self._settling:
            self._settling.popleft().result()

    def _submit(self, name: str, at: int, piece: Piece) -> None:
        while self._waiting and (
            self._held + piece.memory > _HELD or len(self._waiting) >= 2 * self._threads
        ):
            self._take()
        self._held += piece.memory
        self._waiting.append((self._makers.submit(self._make, name, at, piece), name, at, piece))

    def _take(self) -> None:
        future, name, at, piece = self._waiting.popleft()
        checksum = future.result()
        self._held -= piece.memory
        self._written(name, at, piece.nbytes, checksum)
        self._tell(self._done)

    def _make(self, name: str, at: int, piece: Piece) -> int:
        """In a thread: the piece's bytes, made and written; their checksum."""
        written = checksum = 0
        for buffer in piece.make():
            view = _bytes_of(buffer, name)
            if self._stopped.is_set():
                return 0
            if written + len(view) > piece.nbytes:
                break
            checksum = self._write(at + written, view, checksum)
            written += len(view)
        if written != piece.nbytes:
            raise InternalError(f"tensor {name!r}: a piece of {piece.nbytes} bytes came as {written}")
        return checksum

    def _write(self, at: int, view: memoryview, checksum: int) -> int:
        if self._settles:
            checksum = zlib.crc32(view, checksum)
        self._output.write(view, at)
        return checksum

    def _written(self, name: str, at: int, nbytes: int, checksum: int) -> None:
        self._done = at + nbytes
        while self._settling and self._settling[0].done():
            self._settling.popleft().result()
        if not self._settles:
            return
        self._checks.append(_Check(name, at, nbytes, checksum))
        if self._done - self._settled >= _SETTLE:
            self.settle()


def _start_maker() -> None:
    """Prepares a thread that makes pieces."""
    kernels().threads_here(1)  # there is a thread for each processor already
    if sys.platform == "linux":  # elsewhere this would be the priority of the whole process
        # Whoever reads back or hashes is waited for in the end: let them go first.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + 3)


def _settle(output: AtomicFile, checks: Sequence[_Check]) -> None:
    output.sync()
    _compare(output, checks)


def _compare(output: AtomicFile, checks: Sequence[_Check]) -> None:
    """Read the stretches from the disk; they are in the file's order."""
    window = memoryview(bytearray(_WINDOW))
    start = stop = 0  # what the window holds
    for name, at, nbytes, checksum in checks:
        found, end = 0, at + nbytes
        while at < end:
            if at >= stop:
                start, stop = at, at + output.read_back(at, window)
                if stop <= at:
                    raise OutputError(f"{output.path} cannot be read back: it ends at byte {at}")
            last = min(end, stop)
            found = zlib.crc32(window[at - start : last - start], found)
            at = last
        if found != checksum:
            what = f"tensor {name!r}" if name else "its header"
            raise OutputError(
                f"{output.path}: {what} reads back otherwise than it was written; the disk or the memory is "
                "faulty. The file was not put in place"
            )


def _open_again(output: AtomicFile, layout: Layout) -> None:
    """Open the file as a reader would."""
    try:
        with open_descriptor(output.descriptor, output.path) as file:
            read = [(tensor.name, tensor.shape, tensor.type) for tensor in file.tensors.values()]
    except GGUFError as error:
        raise InternalError(f"azquant wrote a file that it cannot read: {error}") from error
    if read != [(spec.name, spec.shape, spec.type) for spec in layout.specs]:
        raise InternalError(f"{output.path}: the tensors read back are not those that were written")


def _bytes_of(piece: Any, name: str) -> memoryview:
    try:
        view = memoryview(piece)
        return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot always be cast
    except (TypeError, ValueError, BufferError) as error:
        raise ArgumentError(f"tensor {name!r}: data came that is no contiguous buffer: {error}") from None
