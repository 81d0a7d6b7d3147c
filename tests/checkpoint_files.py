"""Checkpoint files made by hand, byte by byte, for the tests of azquant.checkpoint."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from azquant.checkpoint import open_checkpoint

SECONDS = 2.0
"""Of processor time: what opening any file may take."""


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header and data, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def torch_zip_bytes(
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    others: dict[str, bytes] | None = None,
) -> bytes:
    """A torch zip file with exactly this data.pkl and these storages."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in (others or {}).items():
            archive.writestr(f"archive/{name}", data)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return out.getvalue()


class Global:
    """Pickles as the bare global ``module.name``, whatever is really there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """Pickles as ``function(*args)``, with ``state`` set on the result if given."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.function, self.args, self.state = function, args, state


class Storage:
    """Pickles as a torch storage."""

    def __init__(self, kind: str, key: str, numel: int, module: str = "torch") -> None:
        self.pid = ("storage", Global(module, kind), key, "cpu", numel)


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Global("collections", "OrderedDict")


def tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Call:
    return Call(REBUILD, storage, offset, shape, strides, False, Call(ORDERED_DICT))


def dumps(value: Any) -> bytes:
    """``value`` as a protocol 2 pickle ending in STOP, with the stand-ins above. No memo."""
    return b"\x80\x02" + _dump(value) + b"."


def _dump(value: Any) -> bytes:
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        state = b"" if value.state is None else _dump(value.state) + b"b"
        return _dump(value.function) + _dump(value.args) + b"R" + state
    if isinstance(value, Storage):
        return _dump(value.pid) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_dump, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_dump, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_dump(k) + _dump(v) for k, v in value.items()) + b"u"
    if isinstance(value, str):
        raw = value.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw
    return pickle.dumps(value, 2)[2:-1]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


GOOD = Storage("FloatStorage", "0", 6)
"""A storage for a member of 24 bytes."""


def small_torch_file() -> bytes:
    """Two tensors, one a transposed view; for truncation and mutation."""
    state = {
        "a": tensor(Storage("FloatStorage", "0", 6), 0, (2, 3), (3, 1)),
        "b": tensor(Storage("HalfStorage", "1", 8), 2, (2, 3), (1, 2)),
    }
    storages = {"0": np.arange(6, dtype="<f4").tobytes(), "1": np.arange(8, dtype="<f2").tobytes()}
    return torch_zip_bytes(dumps(state), storages, others={"byteorder": b"little"})


def read_all(path: Path) -> None:
    """Open and read everything, as a converter would."""
    with open_checkpoint(path) as c:
        for t in c.tensors.values():
            t.read()
        _ = c.extra
