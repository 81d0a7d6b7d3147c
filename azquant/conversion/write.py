"""Tensor data on its way into the file: one band of rows in memory at a time, encoded as it is asked for.

Small tensors are read, turned and encoded ahead by a few threads, within a budget of memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.architectures.base import Keep
from azquant.conversion.plan import PlannedTensor, Source
from azquant.errors import NonFiniteError
from azquant.gguf import TensorSpec
from azquant.ops import encode_rows

__all__ = ["Encoder", "encoded_bands"]

BAND_ELEMENTS = 1 << 22
"""Weights held in float32 at a time (16 MiB), where a transform does not need more."""


AHEAD_ELEMENTS = 1 << 23
"""Weights of the tensors that are encoded ahead of the one being written, together (32 MiB in float32)."""
WORKERS = 2

Bands = list[NDArray[np.uint8]]


class Encoder:
    """The bytes of planned tensors, asked for in order; use it in a ``with``, which ends its threads.

    What is ahead never holds more than AHEAD_ELEMENTS weights; a larger tensor is encoded where it is asked
    for, band by band.
    """

    def __init__(self, items: Sequence[PlannedTensor]) -> None:
        self._items = {item.rule.name: item for item in items}
        self._waiting = deque(item for item in items if item.spec.nbytes)
        self._ahead: dict[str, Future[Bands]] = {}
        self._room = AHEAD_ELEMENTS
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="azquant-encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def data(self, spec: TensorSpec) -> Iterable[NDArray[np.uint8]]:
        """The bytes of the tensor ``spec``, band by band. Errors are those of :func:`encoded_bands`."""
        self._fill()
        future = self._ahead.pop(spec.name, None)
        if future is None:
            if self._waiting and self._waiting[0].rule.name == spec.name:
                self._waiting.popleft()
            return encoded_bands(self._items[spec.name])
        bands = future.result()
        self._room += prod(spec.shape)
        self._fill()
        return bands

    def _fill(self) -> None:
        while self._waiting and prod(self._waiting[0].rule.shape) <= self._room:
            item = self._waiting.popleft()
            self._room -= prod(item.rule.shape)
            self._ahead[item.rule.name] = self._pool.submit(_all_bands, item)


def _all_bands(item: PlannedTensor) -> Bands:
    return list(encoded_bands(item))


def encoded_bands(item: PlannedTensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one planned tensor, band by band.

    Raises NonFiniteError naming the checkpoint's tensor and the index in it of the first NaN or infinity, or
    of a weight too large for the type; CheckpointError when the file cannot be read.
    """
    rule = item.rule
    columns = rule.shape[-1]
    rows = max(1, BAND_ELEMENTS // columns) if len(rule.shape) > 1 else BAND_ELEMENTS
    first_row = 0
    # A Constant asks nothing of its source.
    source: Any = item.source
    for band in rule.transform.bands(source, rows):
        matrix = band.reshape(-1, columns) if band.ndim > 1 else band.reshape(1, -1)
        try:
            yield encode_rows(matrix, item.type, tensor=rule.name, first_row=first_row)
        except NonFiniteError as e:
            raise _explain(e, item) from e
        first_row += matrix.shape[0]


def _explain(error: NonFiniteError, item: PlannedTensor) -> NonFiniteError:
    """The same error in the checkpoint's terms: where its owner finds the bad weight."""
    source = item.source
    if source is None:
        return error
    found = _first_non_finite(source)
    if found is None:  # finite there, but too large for the type
        return NonFiniteError(
            f"{error} (from {source.name} of {source.file}), or convert to f32 or bf16",
            index=error.index,
            tensor=error.tensor,
        )
    flat, value = found
    index = [int(i) for i in np.unravel_index(flat, source.shape)]
    return NonFiniteError(
        f"tensor {source.name} of {source.file} holds {value} at index {index}: such a weight cannot be "
        f"stored in {item.rule.name}, and the model is broken with it",
        index=flat,
        tensor=source.name,
    )


def _first_non_finite(source: Source) -> tuple[int, float] | None:
    """Flat index and value of the first NaN or infinity."""
    before = 0
    rows = max(1, BAND_ELEMENTS // max(1, int(np.prod(source.shape[1:]))))
    for band in Keep().bands(source, rows):
        bad = np.flatnonzero(~np.isfinite(band))
        if bad.size:
            return before + int(bad[0]), float(band.flat[bad[0]])
        before += band.size
    return None
