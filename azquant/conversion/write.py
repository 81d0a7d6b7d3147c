"""Tensor data on its way into the file: bands of rows that threads read, turn and encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.architectures.base import Keep, TensorRule, Transpose
from azquant.conversion.plan import PlannedTensor, Source
from azquant.conversion.stack import StackedSource
from azquant.errors import NonFiniteError
from azquant.gguf import Piece
from azquant.ops import encode_columns, encode_rows

__all__ = ["encoded_bands", "pieces"]

BAND_ELEMENTS = 1 << 20
"""Weights held in float32 at a time (4 MiB), where a transform does not need more."""

_TURNED_ELEMENTS = 1 << 18
"""The same of a matrix that is stored turned: enough rows at once, and few enough to stay in a cache."""
_BLOCK = 32
"""Rows of such a matrix at the least, so that reading a line of the cache serves all of a block."""


def pieces(item: PlannedTensor) -> Iterator[Piece]:
    """One planned tensor in pieces: bands of rows where each can be read by itself, else the whole.

    Errors of making them are those of :func:`encoded_bands`.
    """
    rule, source = item.rule, item.source
    working = 8 * BAND_ELEMENTS  # a band of floats, before and after
    if type(rule.transform) is Transpose and source is not None and len(rule.shape) == 2:
        yield Piece(item.spec.nbytes, partial(_turned, item, source), working + item.spec.nbytes)
        return
    if not isinstance(rule.transform, Keep) or source is None:
        yield Piece(item.spec.nbytes, partial(encoded_bands, item), working)
        return
    rows = source.shape[0]
    row_bytes = item.spec.nbytes // rows
    step = _rows_at_once(rule)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        make = partial(_encoded, item, source.read_f32, first, last)
        yield Piece((last - first) * row_bytes, make, working)


def encoded_bands(item: PlannedTensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one planned tensor, band by band.

    Raises NonFiniteError naming the checkpoint's tensor and the index in it of the first NaN or infinity, or
    of a weight too large for the type; CheckpointError when the file cannot be read.
    """
    # A Constant asks nothing of its source.
    source: Any = item.source
    first = 0
    for band in item.rule.transform.bands(source, _rows_at_once(item.rule)):
        yield _encoded_band(item, band, first)
        first += band.shape[0]


def _rows_at_once(rule: TensorRule) -> int:
    return max(1, BAND_ELEMENTS // max(1, rule.row_elements))


def _encoded(
    item: PlannedTensor, read: Callable[[int, int], NDArray[np.float32]], first: int, last: int
) -> Iterator[NDArray[np.uint8]]:
    yield _encoded_band(item, read(first, last), first)


def _turned(item: PlannedTensor, source: Source) -> Iterator[NDArray[np.uint8]]:
    """A matrix that is stored turned, encoded band by band: only its blocks are held whole."""
    height, width = source.shape
    whole_blocks = max(_BLOCK, item.type.block_size)
    step = max(1, _TURNED_ELEMENTS // width // whole_blocks) * whole_blocks
    encoded = np.empty((width, item.type.row_bytes(height)), np.uint8)
    try:
        encode_columns(
            (source.read_f32(at, min(at + step, height)) for at in range(0, height, step)), item.type, encoded
        )
    except NonFiniteError:
        yield from encoded_bands(item)  # the same error, from rows that know their places
        raise
    yield encoded


def _encoded_band(item: PlannedTensor, band: NDArray[np.float32], first: int) -> NDArray[np.uint8]:
    """The bytes of a band that begins at ``first`` along the tensor's first axis."""
    columns = item.rule.shape[-1]
    first_row = first * (prod(band.shape[1:-1]) if band.ndim > 1 else 0)
    try:
        matrix = band.reshape(-1, columns) if band.ndim > 1 else band.reshape(1, -1)
        return encode_rows(matrix, item.type, tensor=item.rule.name, first_row=first_row)
    except NonFiniteError as e:
        raise _explain(e, item) from e


def _explain(error: NonFiniteError, item: PlannedTensor) -> NonFiniteError:
    """The same error in the checkpoint's terms: where its owner finds the bad weight."""
    source = item.source
    if source is None:
        return error
    parts: tuple[Source, ...] = source.parts if isinstance(source, StackedSource) else (source,)
    broken = next(((part, *found) for part in parts if (found := _first_non_finite(part))), None)
    if broken is None:  # finite there, but too large for the type
        return NonFiniteError(
            f"{error} (from {source.name} of {source.file}), or convert to f32 or bf16",
            index=error.index,
            tensor=error.tensor,
        )
    source, flat, value = broken
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
