"""Whether the numbers that scale a block, or are the elements, are finite.

One NaN in a scale spoils every activation that meets it. This needs no decoder, so that it holds for every
type. Source of the places: the block structures of ggml; ``ggml_validate_row_data`` asks the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.types import GGMLType

__all__ = ["count_not_finite"]

# Byte offsets of the fp16 scales and minima in a block.
_HALVES: dict[str, tuple[int, ...]] = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q8_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq2_xxs": (0,),
    "iq2_xs": (0,),
    "iq2_s": (0,),
    "iq3_xxs": (0,),
    "iq3_s": (0,),
    "iq1_s": (0,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "tq1_0": (52,),
    "tq2_0": (64,),
    "q1_0": (0,),
    "q2_0": (0,),
}
_PIECE = 1 << 16  # blocks, or 32 times as many elements, looked at together


def count_not_finite(data: npt.NDArray[np.uint8], kind: GGMLType) -> tuple[int, int]:
    """How many blocks (elements of plain types) have a scale that is NaN or infinite, and the first's number.

    ``data`` is uint8, whole blocks of ``kind``, little-endian. The number is -1 where all are finite.
    """
    count, first = 0, -1
    step = _PIECE * (32 if kind.block_size == 1 else 1)
    blocks = data.reshape(-1, kind.block_bytes)
    for at in range(0, len(blocks), step):
        bad = _not_finite(blocks[at : at + step], kind)
        if bad is not None and (found := int(np.count_nonzero(bad))):
            if first < 0:
                first = at + int(bad.argmax())
            count += found
    return count, first


def _not_finite(blocks: npt.NDArray[np.uint8], kind: GGMLType) -> npt.NDArray[np.bool_] | None:
    """For each block, whether a scale of it is not finite; ``None`` for types that hold no such number.

    These are the integers, and nvfp4: ggml reads its fp8 scale of all ones, elsewhere NaN, as zero.
    """
    name = kind.name
    if name == "f32":
        return _exponent_full(blocks, "<u4", 0x7F800000)
    if name == "f64":
        return _exponent_full(blocks, "<u8", 0x7FF0000000000000)
    if name == "f16":
        return _exponent_full(blocks, "<u2", 0x7C00)
    if name == "bf16":
        return _exponent_full(blocks, "<u2", 0x7F80)
    if name == "q8_k":  # the one block with an fp32 scale
        return _exponent_full(np.ascontiguousarray(blocks[:, :4]), "<u4", 0x7F800000)
    if name == "mxfp4":  # a power of two; all ones is NaN
        return _equal(blocks[:, :1], 0xFF)
    if name == "iq1_m":  # the fp16 scale lies in the high nibbles of the last four 16-bit numbers
        parts = np.ascontiguousarray(blocks[:, 48:56]).view("<u2") >> 12
        scale = parts[:, 0] | parts[:, 1] << 4 | parts[:, 2] << 8 | parts[:, 3] << 12
        return _equal(scale[:, None] & 0x7C00, 0x7C00)
    if name in _HALVES:
        bad = np.zeros(len(blocks), np.bool_)
        for at in _HALVES[name]:
            bad |= _exponent_full(np.ascontiguousarray(blocks[:, at : at + 2]), "<u2", 0x7C00)
        return bad
    return None


def _exponent_full(blocks: npt.NDArray[np.uint8], dtype: str, mask: int) -> npt.NDArray[np.bool_]:
    bits = blocks.reshape(-1).view(dtype)
    full: npt.NDArray[np.bool_] = (bits & bits.dtype.type(mask)) == mask
    return full


def _equal(parts: npt.NDArray[Any], wanted: int) -> npt.NDArray[np.bool_]:
    """For each row, whether any of it is ``wanted``."""
    equal: npt.NDArray[np.bool_] = (parts == wanted).any(axis=1)
    return equal
