"""What a torch pickle may name, and what each name does here: tokens and functions of our own.

Nothing in this table is, or leads to, the Python object of that name. A function takes the already read
arguments (plain data of unknown shape) and gives plain data, in time independent of how large they are:
a hostile pickle may apply it to the same huge argument again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from azquant.checkpoint.tensor import MAX_DIMS

__all__ = [
    "ALLOWED",
    "DTypeToken",
    "Function",
    "Mismatch",
    "StorageRef",
    "StorageType",
    "TensorRef",
    "brief",
    "natural",
]

MAX_NAME = 64
"""Longest storage key or device name; torch's have a few characters."""


class StorageRef(NamedTuple):
    """A torch storage: ``numel`` elements of ``dtype`` in archive member data/``key``.

    ``dtype`` is "" for an untyped storage, whose ``numel`` counts bytes.
    """

    dtype: str
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A view of a storage. Offset and strides count elements; nothing is checked against the storage yet."""

    dtype: str
    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Mismatch(Exception):
    """What a token was applied to does not fit it."""


class StorageType(NamedTuple):
    dtype: str


class DTypeToken(NamedTuple):
    dtype: str


class Function(NamedTuple):
    name: str
    apply: Callable[[tuple[Any, ...]], Any]


def natural(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise Mismatch(f"{what} {brief(value)} is no size")
    return value


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise Mismatch(f"{what} is a {type(value).__name__}, not a list of sizes")
    if len(value) > MAX_DIMS:
        raise Mismatch(f"{what} has {len(value)} dimensions; at most {MAX_DIMS} can be read")
    return tuple(natural(v, what) for v in value)


def brief(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float)) else f"({type(value).__name__})"


def _view(dtype: str, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise Mismatch(f"its storage is a {type(storage).__name__}")
    sizes, steps = _naturals(shape, "shape"), _naturals(strides, "stride")
    if len(sizes) != len(steps):
        raise Mismatch(f"{len(sizes)} sizes but {len(steps)} strides")
    return TensorRef(dtype, storage, natural(offset, "storage offset"), sizes, steps)


def _tensor_v2(args: tuple[Any, ...]) -> TensorRef:
    """(storage, offset, size, stride, requires_grad, hooks[, metadata])"""
    if not 4 <= len(args) <= 7:
        raise Mismatch(f"{len(args)} arguments")
    if len(args) == 7 and args[6] and args[6] != {"conj": False, "neg": False}:
        raise Mismatch("lazily negated or conjugated tensors cannot be read; save tensor.resolve_neg()")
    if not isinstance(args[0], StorageRef) or not args[0].dtype:
        raise Mismatch("its storage has no element type")
    return _view(args[0].dtype, *args[:4])


def _tensor_v3(args: tuple[Any, ...]) -> TensorRef:
    """(untyped storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])"""
    if not 7 <= len(args) <= 8 or not isinstance(args[6], DTypeToken):
        raise Mismatch("its arguments end in no known dtype")
    return _view(args[6].dtype, *args[:4])


def _parameter(args: tuple[Any, ...]) -> TensorRef:
    """(tensor, requires_grad, hooks[, state])"""
    if not 1 <= len(args) <= 4 or not isinstance(args[0], TensorRef):
        raise Mismatch("it holds no tensor")
    return args[0]


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        raise Mismatch("arguments where none belong")
    return {}


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    if len(args) != 1:
        raise Mismatch(f"{len(args)} arguments")
    return _naturals(args[0], "size")


def _device(args: tuple[Any, ...]) -> str:
    if not 1 <= len(args) <= 2 or not isinstance(args[0], str) or len(args[0]) > MAX_NAME:
        raise Mismatch("no device name")
    return args[0] if len(args) == 1 else f"{args[0]}:{natural(args[1], 'device index')}"


_STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
# An untyped storage counts bytes; dtype "" says that the tensor brings the type.
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Function("collections.OrderedDict", _ordered_dict),
    ("torch", "Size"): Function("torch.Size", _size),
    ("torch", "device"): Function("torch.device", _device),
    ("torch._utils", "_rebuild_tensor"): Function("torch._utils._rebuild_tensor", _tensor_v2),
    ("torch._utils", "_rebuild_tensor_v2"): Function("torch._utils._rebuild_tensor_v2", _tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Function("torch._utils._rebuild_tensor_v3", _tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Function("torch._utils._rebuild_parameter", _parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(
        "torch._utils._rebuild_parameter_with_state", _parameter
    ),
    ("torch", "UntypedStorage"): StorageType(""),
    ("torch.storage", "UntypedStorage"): StorageType(""),
    **{("torch", name): StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    **{("torch", name): DTypeToken(dtype) for name, dtype in _TORCH_DTYPES.items()},
}
