"""The ggml tensor types, one row each: what GGUF's type numbers mean and how large their blocks are.

Source of numbers and sizes: the ``ggml_type`` enumeration and block structures of ggml. A tensor of a
block type stores each row (the innermost dimension) as whole blocks of ``block_size`` elements.
"""

from __future__ import annotations

from typing import NamedTuple

from azquant.errors import ShapeError, UnsupportedTypeError

__all__ = ["TYPES", "GGMLType", "get_type", "type_by_id"]


class GGMLType(NamedTuple):
    """One ggml tensor type."""

    name: str
    """Lower-case name, as in file names and on the command line: ``"q4_0"``."""
    id: int
    """The number that stands for it in a GGUF file."""
    block_size: int
    """Elements per block (1 for plain types)."""
    block_bytes: int
    """Bytes per block."""
    can_quantize: bool = False
    """Whether :func:`azquant.quantize` can make it."""
    can_dequantize: bool = False
    """Whether :meth:`azquant.QTensor.dequantize` and :func:`azquant.matmul` can read it."""

    @property
    def bits_per_weight(self) -> float:
        """Bits that one element takes on average, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_quantized(self) -> bool:
        """Whether elements share a block (a scale), so that rows must be whole blocks."""
        return self.block_size > 1

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of ``k`` elements. Raises ShapeError when ``k`` is no whole number of blocks."""
        if k < 0 or k % self.block_size:
            raise ShapeError(
                f"a row of {k} elements is not a whole number of {self.name} blocks ({self.block_size})"
            )
        return k // self.block_size * self.block_bytes

    def __str__(self) -> str:
        return self.name


_ROWS = (
    #         name      id   block bytes  quantize dequantize
    GGMLType("f32", 0, 1, 4, True, True),
    GGMLType("f16", 1, 1, 2, True, True),
    GGMLType("q4_0", 2, 32, 18, True, True),
    GGMLType("q4_1", 3, 32, 20, True, True),
    GGMLType("q5_0", 6, 32, 22, True, True),
    GGMLType("q5_1", 7, 32, 24, True, True),
    GGMLType("q8_0", 8, 32, 34, True, True),
    GGMLType("q8_1", 9, 32, 36),
    GGMLType("q2_k", 10, 256, 84, True, True),
    GGMLType("q3_k", 11, 256, 110, True, True),
    GGMLType("q4_k", 12, 256, 144, True, True),
    GGMLType("q5_k", 13, 256, 176, True, True),
    GGMLType("q6_k", 14, 256, 210, True, True),
    GGMLType("q8_k", 15, 256, 292, can_dequantize=True),
    GGMLType("iq2_xxs", 16, 256, 66, can_dequantize=True),
    GGMLType("iq2_xs", 17, 256, 74, can_dequantize=True),
    GGMLType("iq3_xxs", 18, 256, 98, can_dequantize=True),
    GGMLType("iq1_s", 19, 256, 50, can_dequantize=True),
    GGMLType("iq4_nl", 20, 32, 18, True, True),
    GGMLType("iq3_s", 21, 256, 110, can_dequantize=True),
    GGMLType("iq2_s", 22, 256, 82, can_dequantize=True),
    GGMLType("iq4_xs", 23, 256, 136, True, True),
    GGMLType("i8", 24, 1, 1),
    GGMLType("i16", 25, 1, 2),
    GGMLType("i32", 26, 1, 4),
    GGMLType("i64", 27, 1, 8),
    GGMLType("f64", 28, 1, 8),
    GGMLType("iq1_m", 29, 256, 56, can_dequantize=True),
    GGMLType("bf16", 30, 1, 2, True, True),
    GGMLType("tq1_0", 34, 256, 54, True, True),
    GGMLType("tq2_0", 35, 256, 66, True, True),
    GGMLType("mxfp4", 39, 32, 17, True, True),
    GGMLType("nvfp4", 40, 64, 36, can_dequantize=True),
    GGMLType("q1_0", 41, 128, 18, can_dequantize=True),
    GGMLType("q2_0", 42, 64, 18, can_dequantize=True),
)

TYPES: dict[str, GGMLType] = {row.name: row for row in _ROWS}
"""Every known type by its lower-case name."""

_BY_ID: dict[int, GGMLType] = {row.id: row for row in _ROWS}


def get_type(name: str | GGMLType) -> GGMLType:
    """The type called ``name`` (any case). Raises UnsupportedTypeError listing the known names."""
    if isinstance(name, GGMLType):
        return name
    found = TYPES.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedTypeError(f"unknown type {name!r}; known are {', '.join(TYPES)}")
    return found


def type_by_id(number: int) -> GGMLType | None:
    """The type that GGUF writes as ``number``, or ``None`` when no type has it."""
    return _BY_ID.get(number)
