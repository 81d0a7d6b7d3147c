"""The safetensors container: header checks and lazy tensors.

::

    u64 n (little-endian) | n bytes of JSON | tensor bytes up to the end of the file

    {"__metadata__": {str: str}, "<name>": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ...}

Offsets count from the first byte after the header. The rules are those of the format's own description and
its reference reader: the header has at most 100 MB and repeats no key, and the ranges cover the data exactly,
with no overlap, hole or trailing byte. The reader is our own because it must give row ranges and BF16 without
torch.
"""

from __future__ import annotations

import reprlib
from typing import Any

from azquant.checkpoint.jsonfile import parse_object
from azquant.checkpoint.source import FileSource
from azquant.checkpoint.tensor import DTYPES, MAX_DIMS, LazyTensor, element_count
from azquant.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "MAX_TENSORS", "read_safetensors"]

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
"""Per file; more than the largest published checkpoints have. Keeps opening fast."""

_LENGTH_BYTES = 8


def read_safetensors(source: FileSource) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, in header order.

    Raises CheckpointError with the byte offset when anything in the header breaks the format.
    """
    if source.size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{source.size} bytes are no safetensors file: the header length alone takes 8", path=source.path
        )
    length = int.from_bytes(source.read(0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed. "
            "This may be no safetensors file at all",
            path=source.path,
            offset=0,
        )
    if _LENGTH_BYTES + length > source.size:
        raise CheckpointError(
            f"the header claims {length} bytes, the file has {source.size}: it is truncated",
            path=source.path,
            offset=0,
        )
    raw = source.read(_LENGTH_BYTES, length)
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        raise CheckpointError("the header is no JSON object", path=source.path, offset=_LENGTH_BYTES)
    header = parse_object(raw, source.path, offset=_LENGTH_BYTES, unique=True)
    _check_metadata(header.pop("__metadata__", {}), source)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{len(header)} tensors; at most {MAX_TENSORS} are read", path=source.path)
    start = _LENGTH_BYTES + length
    tensors: dict[str, LazyTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, info in header.items():
        dtype, shape, begin, end = _check_info(name, info, source)
        tensors[name] = LazyTensor(name, shape, dtype, source, start + begin)
        ranges.append((begin, end, name))
    _check_cover(ranges, start, source)
    return tensors


def _check_metadata(metadata: Any, source: FileSource) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ must map strings to strings", path=source.path, offset=8)


def _check_info(name: str, info: Any, source: FileSource) -> tuple[str, tuple[int, ...], int, int]:
    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"tensor {name!r}: {problem}", path=source.path, offset=_LENGTH_BYTES)

    if not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as e:
            raise fail("its name holds half a surrogate pair, which is no text") from e
    if not isinstance(info, dict):
        raise fail("its entry in the header is no JSON object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"dtype {_short(dtype)} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise fail(f"shape {_short(shape)} is no list of sizes")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and n >= 0 for n in offsets)
    ):
        raise fail(f"data_offsets {_short(offsets)} are not [begin, end]")
    begin, end = offsets
    itemsize = DTYPES[dtype].itemsize
    count = element_count(tuple(shape), itemsize)
    if count is None:
        raise fail(f"shape {_short(shape)} overflows, or has more than {MAX_DIMS} dimensions")
    if count * itemsize != end - begin:
        raise fail(
            f"shape {_short(shape)} of {dtype} takes {count * itemsize} bytes, data_offsets "
            f"[{begin}, {end}] hold {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _check_cover(ranges: list[tuple[int, int, str]], start: int, source: FileSource) -> None:
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            what = (
                "overlap the tensor before it" if begin < at else f"leave a hole of {begin - at} bytes before"
            )
            raise CheckpointError(
                f"tensor {name!r}: data_offsets [{begin}, {end}] {what}", path=source.path, offset=start + at
            )
        at = end
    if start + at > source.size:
        raise CheckpointError(
            f"the tensors need {start + at} bytes, the file has {source.size}: it is truncated",
            path=source.path,
            offset=source.size,
        )
    if start + at < source.size:
        raise CheckpointError(
            f"{source.size - start - at} bytes after the last tensor belong to none",
            path=source.path,
            offset=start + at,
        )


def _short(value: Any) -> str:
    return reprlib.repr(value)  # bounded in length and in depth
