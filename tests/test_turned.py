"""Matrices that a checkpoint stores turned are encoded to the bytes of their transpose."""

from __future__ import annotations

import numpy as np
import pytest

from azquant.errors import NonFiniteError
from azquant.ops import encode_columns, encode_rows
from azquant.types import get_type

GUARD = 0x5A


def encoded_in_bands(x: np.ndarray, kind: str, step: int) -> np.ndarray:
    found = get_type(kind)
    row_bytes = found.row_bytes(len(x))
    held = np.full((x.shape[1] + 2, row_bytes), GUARD, np.uint8)
    bands = (np.ascontiguousarray(x[at : at + step]) for at in range(0, len(x), step))
    encode_columns(bands, found, held[1:-1])
    assert (held[[0, -1]] == GUARD).all()
    return held[1:-1].reshape(-1)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q6_k", "q4_k", "f16", "f32"])
@pytest.mark.parametrize("columns", [1, 3, 16, 67, 300])
def test_bytes_are_those_of_the_transpose(isa: str, kind: str, columns: int) -> None:
    unit = get_type(kind).block_size
    x = np.random.default_rng(columns).standard_normal((3 * max(unit, 32), columns), dtype=np.float32)
    wanted = encode_rows(np.ascontiguousarray(x.T), get_type(kind))
    for step in (len(x), max(unit, 32), 2 * max(unit, 32)):
        assert np.array_equal(encoded_in_bands(x, kind, step), wanted)


@pytest.mark.parametrize("rows", [1, 2, 5, 35])
def test_plain_types_take_any_number_of_rows(isa: str, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 21), dtype=np.float32)
    assert np.array_equal(encoded_in_bands(x, "f32", 3).view(np.float32), x.T.reshape(-1))


@pytest.mark.parametrize(("kind", "value"), [("q4_0", np.nan), ("q8_0", np.inf), ("f16", 7e4), ("q4_0", 6e5)])
@pytest.mark.parametrize("place", [(0, 0), (63, 40), (40, 7)])
def test_what_a_type_cannot_hold_is_refused(
    isa: str, kind: str, value: float, place: tuple[int, int]
) -> None:
    x = np.ones((64, 41), np.float32)
    x[place] = value
    with pytest.raises(NonFiniteError):
        encoded_in_bands(x, kind, 32)
