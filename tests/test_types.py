"""The type table against two tables nobody here wrote: gguf's, and that of ggml itself."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import pytest

from azquant.errors import ShapeError, UnsupportedTypeError
from azquant.types import TYPES, get_type, type_by_id

IN_GGUF = {int(kind): (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The ggml library within xllamacpp."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_type_name.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("number", sorted(IN_GGUF))
def test_every_type_of_gguf_is_known_and_alike(number: int) -> None:
    row = type_by_id(number)
    assert row is not None
    expected = IN_GGUF[number]
    if row.name == "q8_1":
        expected = ("q8_1", 32, 36)  # gguf still has 40, from when its two scales were 32-bit floats
    assert (row.name, row.block_size, row.block_bytes) == expected


def test_every_row_is_what_ggml_says(ggml: ctypes.CDLL) -> None:
    for number in range(43):
        row = type_by_id(number)
        block_size = ggml.ggml_blck_size(number)
        if row is None:
            assert block_size == 0, f"ggml knows type {number}"
            continue
        assert (row.name, row.block_size, row.block_bytes) == (
            ggml.ggml_type_name(number).decode().lower(),
            block_size,
            ggml.ggml_type_size(number),
        )


def test_names_and_numbers_are_unique() -> None:
    assert len({row.id for row in TYPES.values()}) == len(TYPES)
    assert all(type_by_id(row.id) is row and get_type(name.upper()) is row for name, row in TYPES.items())


def test_the_newest_type_is_42() -> None:
    assert get_type("q2_0").id == 42
    assert type_by_id(43) is None
    assert type_by_id(4) is None  # removed from ggml
    with pytest.raises(UnsupportedTypeError, match=r"q9_9.*q4_0"):
        get_type("q9_9")


def test_rows_are_whole_blocks() -> None:
    q4_0 = get_type("q4_0")
    assert q4_0.row_bytes(64) == 36
    assert q4_0.bits_per_weight == 4.5
    with pytest.raises(ShapeError, match=r"33.*q4_0"):
        q4_0.row_bytes(33)
