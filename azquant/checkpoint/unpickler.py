"""A reader for the pickles torch writes, which cannot run code because it has no way to call anything.

Python's own unpickler imports and calls what the file names; filtering its imports still leaves a large
machine facing hostile bytes. This one interprets the few dozen opcodes that a state dict needs. GLOBAL
gives a token out of a fixed table, never an import; REDUCE applies our own function for that token to plain
data; BUILD can only throw attributes away. Anything else raises UnsafePickleError that names it.

Time and memory are bounded by the pickle's length: at most MAX_OPCODES steps, each adding O(its own bytes);
keys are text or small integers, so that hashing cannot be made slow; no step recurses.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from azquant.checkpoint.torch_globals import (
    ALLOWED,
    MAX_NAME,
    Function,
    Mismatch,
    StorageRef,
    StorageType,
    TensorRef,
    brief,
    natural,
)
from azquant.errors import CheckpointError, UnsafePickleError

__all__ = ["MAX_OPCODES", "StorageRef", "TensorRef", "load_pickle"]

MAX_OPCODES = 1_000_000
"""About 35,000 tensors' worth; the limit is per file."""

_MAX_INT_BYTES = 16
_MAX_INT_KEY = 1 << 20
_MAX_MEMO = MAX_OPCODES
_MAX_MARKS = 1000


def load_pickle(data: bytes, path: Path, offset: int) -> Any:
    """The object that the pickle ``data`` describes; ``path`` and ``offset`` (of data[0]) are for messages.

    The result is made of dict, list, tuple, str, bytes, int, float, bool, None, StorageRef and TensorRef. It
    may hold itself and may share parts. Raises UnsafePickleError and CheckpointError, nothing else.
    """
    return _Machine(data, path, offset).run()


_u16 = struct.Struct("<H").unpack_from
_i32 = struct.Struct("<i").unpack_from
_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from
_f64 = struct.Struct(">d").unpack_from


class _Machine:
    """The pickle machine: a stack, the stacks set aside by MARK, and a memo."""

    def __init__(self, data: bytes, path: Path, offset: int) -> None:
        self.data = data
        self.path = path
        self.base = offset
        self.here = 0  # the opcode at work
        self.at = 0  # the next byte to read
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        table = {code: getattr(self, method) for code, method in _OPCODES.items()}
        try:
            for _ in range(MAX_OPCODES):
                self.here = self.at
                code = self.data[self.at]
                self.at += 1
                if code == _STOP:
                    return self._result()
                op = table.get(code)
                if op is None:
                    raise self._opcode_refusal(code)
                op()
        except IndexError as e:
            # Reading past the data and popping an empty stack both end here.
            what = "ends too early" if self.at >= len(self.data) else "takes from an empty stack"
            raise self._error(f"the pickle {what}") from e
        except struct.error as e:
            raise self._error("the pickle ends too early") from e
        except Mismatch as e:
            raise self._error(str(e)) from e
        raise self._error(f"the pickle has more than {MAX_OPCODES} steps")

    def _error(self, message: str, at: int | None = None) -> CheckpointError:
        at = self.here if at is None else at
        return CheckpointError(message, path=self.path, offset=self.base + at)

    def _refusal(self, message: str) -> UnsafePickleError:
        return UnsafePickleError(
            f"{message}. Nothing was executed. Save the weights alone: torch.save(model.state_dict(), path)",
            path=self.path,
            offset=self.base + self.here,
        )

    def _opcode_refusal(self, code: int) -> UnsafePickleError:
        import pickletools  # only for the opcode's name, and only here

        names = {op.code: op.name for op in pickletools.opcodes}
        name = names.get(chr(code), f"0x{code:02x}")
        return self._refusal(f"the pickle uses opcode {name}, which no state dict needs")

    def _result(self) -> Any:
        if self.at != len(self.data):
            raise self._error("bytes follow the end of the pickle", self.at)
        if len(self.stack) != 1 or self.marks:
            raise self._error("the pickle does not end in one object", self.at)
        return self.stack[0]

    # Operands.

    def _take(self, size: int) -> bytes:
        start = self.at
        self.at = start + size
        if self.at > len(self.data):
            raise self._error(f"the pickle ends inside {size} bytes", start)
        return self.data[start : self.at]

    def _u8(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def _u32(self) -> int:
        value: int = _u32(self.data, self.at)[0]
        self.at += 4
        return value

    def _u64(self) -> int:
        value: int = _u64(self.data, self.at)[0]
        self.at += 8
        return value

    def _text(self, size: int) -> None:
        raw = self._take(size)
        try:
            self.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise self._error("text in the pickle is not UTF-8", self.at - size + e.start) from e

    def _line(self) -> str:
        end = self.data.index(b"\n", self.at) if b"\n" in self.data[self.at : self.at + 256] else -1
        if end < 0:
            raise Mismatch("a name in the pickle has no end")
        raw = self._take(end - self.at)
        self.at += 1
        return raw.decode("utf-8", "replace")

    # Opcodes, in the order of the pickle documentation.

    def proto(self) -> None:
        version = self._u8()
        if self.at != 2 or version > 5:
            raise Mismatch(f"pickle protocol {version} at byte {self.at - 2} of the pickle")

    def frame(self) -> None:
        if self._u64() > len(self.data) - self.at:
            raise Mismatch("a frame of the pickle is longer than the pickle")

    def none(self) -> None:
        self.stack.append(None)

    def true_(self) -> None:
        self.stack.append(True)

    def false(self) -> None:
        self.stack.append(False)

    def binint(self) -> None:
        self.stack.append(_i32(self.data, self.at)[0])
        self.at += 4

    def binint1(self) -> None:
        self.stack.append(self._u8())

    def binint2(self) -> None:
        self.stack.append(_u16(self.data, self.at)[0])
        self.at += 2

    def long1(self) -> None:
        size = self._u8()
        if size > _MAX_INT_BYTES:
            raise Mismatch(f"an integer of {size} bytes")
        self.stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def binfloat(self) -> None:
        self.stack.append(_f64(self.data, self.at)[0])
        self.at += 8

    def short_binunicode(self) -> None:
        self._text(self._u8())

    def binunicode(self) -> None:
        self._text(self._u32())

    def binunicode8(self) -> None:
        self._text(self._u64())

    def short_binbytes(self) -> None:
        self.stack.append(self._take(self._u8()))

    def binbytes(self) -> None:
        self.stack.append(self._take(self._u32()))

    def mark(self) -> None:
        if len(self.marks) == _MAX_MARKS:
            raise Mismatch(f"more than {_MAX_MARKS} containers are open at once")
        self.marks.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def empty_tuple(self) -> None:
        self.stack.append(())

    def tuple_(self) -> None:
        items = self._pop_mark()
        self.stack.append((*items,))

    def tuple1(self) -> None:
        self.stack[-1] = (self.stack[-1],)

    def tuple2(self) -> None:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)

    def tuple3(self) -> None:
        last = self.stack.pop()
        middle = self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)

    def empty_list(self) -> None:
        self.stack.append([])

    def append(self) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def appends(self) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def empty_dict(self) -> None:
        self.stack.append({})

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set(self._top(dict), key, value)

    def setitems(self) -> None:
        items = self._pop_mark()
        if len(items) % 2:
            raise Mismatch("a key without a value")
        target = self._top(dict)
        for i in range(0, len(items), 2):
            self._set(target, items[i], items[i + 1])

    def _set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        if type(key) is not str and not (type(key) is int and 0 <= key < _MAX_INT_KEY):
            raise Mismatch(f"a dictionary key {brief(key)}; keys are text or small integers")
        target[key] = value

    def _top(self, kind: type[Any]) -> Any:
        target = self.stack[-1]
        if type(target) is not kind:
            raise Mismatch(f"items put into a {type(target).__name__}")
        return target

    def binget(self) -> None:
        self._get(self._u8())

    def long_binget(self) -> None:
        self._get(self._u32())

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise Mismatch(f"the pickle refers to object {index}, which it has not stored")
        self.stack.append(self.memo[index])

    def binput(self) -> None:
        self.memo[self._u8()] = self.stack[-1]

    def long_binput(self) -> None:
        index = self._u32()
        if index >= _MAX_MEMO:
            raise Mismatch(f"an object is stored as number {index}")
        self.memo[index] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def global_(self) -> None:
        module = self._line()
        self._find(module, self._line())

    def stack_global(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Mismatch("a global whose name is no text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        token = ALLOWED.get((module, name))
        if token is None:
            raise self._refusal(
                f"the pickle asks for {f'{module}.{name}'[:200]!r}, which is not a plain tensor part"
            )
        self.stack.append(token)

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Function):
            raise self._refusal(f"the pickle calls a {type(function).__name__.lstrip('_')}")
        if type(args) is not tuple:
            raise Mismatch(f"{function.name} called with no argument tuple")
        try:
            self.stack[-1] = function.apply(args)
        except Mismatch as e:
            raise Mismatch(f"{function.name}: {e}") from None

    def build(self) -> None:
        """Attributes: torch hangs ``_metadata`` on a state dict. They are dropped, and fit nothing else."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise self._refusal(f"the pickle sets the state of a {type(self.stack[-1]).__name__.lstrip('_')}")

    def binpersid(self) -> None:
        """("storage", storage type, key, location, numel[, view]): torch's only kind of external object."""
        pid = self.stack[-1]
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise Mismatch("an external object that is no storage")
        kind, key, _, numel = pid[1:5]
        if not isinstance(kind, StorageType) or not isinstance(key, str) or len(key) > MAX_NAME:
            raise Mismatch("a storage without type or key")
        if len(pid) == 6 and pid[5] is not None:
            raise Mismatch("a storage that is a view of another one")
        self.stack[-1] = StorageRef(kind.dtype, key, natural(numel, "storage size"))


_STOP = ord(".")
_OPCODES = {
    ord(code): method
    for code, method in {
        "\x80": "proto",
        "\x95": "frame",
        "N": "none",
        "\x88": "true_",
        "\x89": "false",
        "J": "binint",
        "K": "binint1",
        "M": "binint2",
        "\x8a": "long1",
        "G": "binfloat",
        "\x8c": "short_binunicode",
        "X": "binunicode",
        "\x8d": "binunicode8",
        "C": "short_binbytes",
        "B": "binbytes",
        "(": "mark",
        ")": "empty_tuple",
        "t": "tuple_",
        "\x85": "tuple1",
        "\x86": "tuple2",
        "\x87": "tuple3",
        "]": "empty_list",
        "a": "append",
        "e": "appends",
        "}": "empty_dict",
        "s": "setitem",
        "u": "setitems",
        "h": "binget",
        "j": "long_binget",
        "q": "binput",
        "r": "long_binput",
        "\x94": "memoize",
        "c": "global_",
        "\x93": "stack_global",
        "R": "reduce",
        "b": "build",
        "Q": "binpersid",
    }.items()
}
