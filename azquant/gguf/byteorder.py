"""Tensor data of big-endian files, turned to the order that everything else works on.

A big-endian file differs from a little-endian one in the numbers of two bytes and more: all elements of the
plain types, and in blocks the scales; what is packed bit by bit stays. Source: the block structures of ggml
and ``gguf_convert_endian`` of llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from azquant._lazy import np
from azquant.errors import UnsupportedTypeError
from azquant.types import GGMLType

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["swapped"]

# Of blocks: where their 16-bit numbers lie. Types that are not here have others, or nobody has such files.
_HALVES: dict[str, tuple[int, ...]] = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "mxfp4": (),
}


def swapped(data: npt.NDArray[np.uint8], kind: GGMLType) -> npt.NDArray[np.uint8]:
    """``data``, whole blocks of ``kind`` in one byte order, as a new array in the other.

    Raises UnsupportedTypeError for a type whose blocks are not known well enough.
    """
    if kind.block_size == 1:
        # Copied, since a single element turned round would be a view that runs backwards.
        return np.ascontiguousarray(data.reshape(-1, kind.block_bytes)[:, ::-1]).reshape(-1)
    halves = _HALVES.get(kind.name)
    if halves is None:
        raise UnsupportedTypeError(f"{kind} data of big-endian files cannot be read")
    blocks: npt.NDArray[np.uint8] = data.reshape(-1, kind.block_bytes).copy()
    for at in halves:
        blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    return blocks.reshape(data.shape)
