"""GGUF files put together by hand, byte by byte, right or wrong in any way a test needs.

Written from the specification alone, so that neither our writer nor our reader is its own judge.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(content: bytes | str, order: str = "<", length: int | None = None) -> bytes:
    """A string; ``length`` is what it says of itself."""
    content = content.encode() if isinstance(content, str) else content
    return struct.pack(order + "Q", len(content) if length is None else length) + content


def pair(key: bytes | str, kind: int, payload: bytes, order: str = "<") -> bytes:
    """A key with its value."""
    return text(key, order) + struct.pack(order + "I", kind) + payload


def array(kind: int, count: int, payload: bytes, order: str = "<") -> bytes:
    """An array's payload; ``count`` is what it says of itself."""
    return struct.pack(order + "IQ", kind, count) + payload


def info(
    name: bytes | str,
    dims: Sequence[int],
    kind: int = 0,
    offset: int = 0,
    order: str = "<",
    n_dims: int | None = None,
) -> bytes:
    """An entry of the tensor table. ``dims`` as in the file: innermost first."""
    n_dims = len(dims) if n_dims is None else n_dims
    packed = b"".join(struct.pack(order + "Q", d % 2**64) for d in dims)
    return (
        text(name, order)
        + struct.pack(order + "I", n_dims)
        + packed
        + struct.pack(order + "IQ", kind, offset)
    )


def gguf(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes | None = b"",
    *,
    order: str = "<",
    version: int = 3,
    magic: bytes = b"GGUF",
    n_pairs: int | None = None,
    n_infos: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file, its data padded at the front; without padding or data when ``data`` is None."""
    head = magic + struct.pack(
        order + "IQQ",
        version,
        len(infos) if n_infos is None else n_infos,
        len(pairs) if n_pairs is None else n_pairs,
    )
    head += b"".join(pairs) + b"".join(infos)
    return head if data is None else head + bytes(-len(head) % alignment) + data
