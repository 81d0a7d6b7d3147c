"""torch's zip format (torch >= 1.6): a pickle that describes tensors and one stored member per storage.

::

    archive/data.pkl     the object; a tensor is (storage key, offset, sizes, strides)
    archive/data/<key>   the bytes of one storage
    archive/byteorder    b"little" or b"big" (absent in older files: little)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from azquant.checkpoint.source import FileSource
from azquant.checkpoint.tensor import DTYPES, LazyTensor, element_count
from azquant.checkpoint.torch_globals import StorageRef, TensorRef
from azquant.checkpoint.unpickler import load_pickle
from azquant.checkpoint.zip_index import ZipIndex
from azquant.errors import CheckpointError

__all__ = ["MAX_PICKLE_BYTES", "TorchFile", "read_torch"]

MAX_PICKLE_BYTES = 100_000_000
"""As for a safetensors header; the pickle of the largest published checkpoints has a few megabytes."""

# A view may repeat elements (torch.expand gives stride 0), so its size is not bounded by the file's. Up to
# this many elements that does no harm.
_MAX_REPEATED = 1 << 20

# Names under which training scripts keep the state dict beside other things.
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")

_MAX_EXTRA_NODES = 200_000
_MAX_EXTRA_DEPTH = 32


class TorchFile(NamedTuple):
    """The state dict of a torch file, and a function giving what else it holds."""

    tensors: dict[str, LazyTensor]
    read_extra: Callable[[], dict[str, Any]]


def read_torch(source: FileSource) -> TorchFile:
    """The state dict in a torch zip file: the top-level one, or the one under "state_dict", "model",
    "model_state_dict" or "module".

    Raises UnsafePickleError when the pickle wants anything but tensors and plain containers, CheckpointError
    when the file breaks its format.
    """
    return _Archive(source).read()


class _Archive:
    def __init__(self, source: FileSource) -> None:
        self.source = source
        self.zip = ZipIndex(source)
        self.prefix = self._find_prefix()
        self.big_endian = self._read_byte_order()
        self.storages: dict[StorageRef, int] = {}

    def read(self) -> TorchFile:
        pickle, offset = self._record("data.pkl", MAX_PICKLE_BYTES)
        root = load_pickle(pickle, self.source.path, offset)
        if not isinstance(root, dict):
            kind = "tensor" if isinstance(root, TensorRef) else type(root).__name__
            raise self.error(f"the file holds one {kind}, not a state dict", offset)
        state, where = root, None
        for key in _STATE_DICT_KEYS:
            nested = root.get(key)
            if isinstance(nested, dict) and any(isinstance(v, TensorRef) for v in nested.values()):
                state, where = nested, key
                break
        tensors = {
            name: self.tensor(name, value)
            for name, value in state.items()
            if isinstance(name, str) and isinstance(value, TensorRef)
        }
        if not tensors:
            keys = ", ".join(repr(key)[:40] for key in list(root)[:8]) or "none"
            raise self.error(f"no state dict of tensors was found; the top-level keys are: {keys}", offset)

        def read_extra() -> dict[str, Any]:
            # The state dict's own tensors are not repeated; other entries of it (rare) stay under its key.
            rest = {k: v for k, v in state.items() if not (isinstance(k, str) and isinstance(v, TensorRef))}
            if where is not None:
                others = {k: v for k, v in root.items() if k != where}
                rest = {**others, where: rest} if rest else others
            return _Tree(self).copy_dict(rest, "", 0)

        return TorchFile(tensors, read_extra)

    def error(self, message: str, offset: int | None = None) -> CheckpointError:
        return CheckpointError(message, path=self.source.path, offset=offset)

    def _find_prefix(self) -> str:
        names = self.zip.members
        found = [n for n in names if n == "data.pkl" or (n.endswith("/data.pkl") and n.count("/") == 1)]
        if len(found) != 1:
            some = ", ".join(repr(n)[:60] for n in list(names)[:4]) or "nothing"
            raise self.error(
                f"a zip archive with {len(found) or 'no'} data.pkl is no torch checkpoint (it holds {some})"
            )
        prefix = found[0][: -len("data.pkl")]
        if prefix + "constants.pkl" in names:
            raise self.error(
                "a TorchScript program (torch.jit.save), not a checkpoint; save its weights with "
                "torch.save(module.state_dict(), path)"
            )
        return prefix

    def _read_byte_order(self) -> bool:
        if self.prefix + "byteorder" not in self.zip.members:
            return False
        order, offset = self._record("byteorder", 16)
        if order not in (b"little", b"big"):
            raise self.error(f"unknown byte order {order!r}", offset)
        return order == b"big"

    def _record(self, name: str, max_bytes: int) -> tuple[bytes, int]:
        member = self.zip.members[self.prefix + name]
        if member.size > max_bytes:
            raise self.error(
                f"{name} has {member.size} bytes; at most {max_bytes} are read", member.header_offset
            )
        offset = self.zip.data_offset(member)
        return self.source.read(offset, member.size), offset

    def _storage(self, storage: StorageRef, name: str) -> int:
        """Byte offset of a storage's data, checked to hold the elements it claims."""
        known = self.storages.get(storage)
        if known is not None:
            return known
        member = self.zip.members.get(f"{self.prefix}data/{storage.key}")
        if member is None:
            raise self.error(f"tensor {name!r}: its storage data/{storage.key} is missing from the archive")
        needed = storage.numel * (DTYPES[storage.dtype].itemsize if storage.dtype else 1)
        if member.size != needed:
            raise self.error(
                f"tensor {name!r}: its storage data/{storage.key} has {member.size} bytes, "
                f"{storage.numel} elements of {storage.dtype or 'bytes'} need {needed}",
                member.header_offset,
            )
        offset = self.zip.data_offset(member)
        self.storages[storage] = offset
        return offset

    def tensor(self, name: str, ref: TensorRef) -> LazyTensor:
        offset = self._storage(ref.storage, name)
        itemsize = DTYPES[ref.dtype].itemsize
        held = ref.storage.numel if ref.storage.dtype else ref.storage.numel // itemsize
        count = element_count(ref.shape, itemsize)
        if count is None:
            raise self.error(f"tensor {name!r}: shape {ref.shape} overflows")
        last = ref.offset + sum((n - 1) * step for n, step in zip(ref.shape, ref.strides, strict=True))
        if count and last >= held:
            raise self.error(
                f"tensor {name!r}: shape {ref.shape} with strides {ref.strides} from element {ref.offset} "
                f"reaches element {last}; its storage data/{ref.storage.key} has {held}",
                offset,
            )
        if count > max(held, _MAX_REPEATED):
            raise self.error(
                f"tensor {name!r}: a view of {count} elements that repeats the {held} of its storage; "
                "save it with .contiguous()",
                offset,
            )
        return LazyTensor(
            name,
            ref.shape,
            ref.dtype,
            self.source,
            offset + ref.offset * itemsize,
            strides=ref.strides,
            big_endian=self.big_endian,
        )


class _Tree:
    """Copies an unpickled tree, with bounds: shared parts could unfold without end."""

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.left = _MAX_EXTRA_NODES

    def copy_dict(self, value: dict[Any, Any], name: str, depth: int) -> dict[Any, Any]:
        return {
            key: self._copy(item, f"{name}.{key}" if name else str(key), depth) for key, item in value.items()
        }

    def _copy(self, value: Any, name: str, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > _MAX_EXTRA_DEPTH:
            raise self.archive.error(
                f"what the file holds beside its state dict is too large (over {_MAX_EXTRA_NODES} objects), "
                f"too deep (over {_MAX_EXTRA_DEPTH}), or holds itself"
            )
        if isinstance(value, TensorRef):
            return self.archive.tensor(name, value)
        if isinstance(value, dict):
            return self.copy_dict(value, name, depth + 1)
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value))
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        return str(value[0])  # a dtype token or the like: its name
