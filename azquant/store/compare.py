"""What differs between two models: their tensors byte for byte, metadata, and what they are run with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from azquant.gguf import GGUFArray, GGUFFile, GGUFTensor, open_gguf
from azquant.store.info import ModelInfo

__all__ = ["Change", "Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs. ``None`` on a side: it is not there."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Comparison:
    """What is different in ``after``."""

    before: ModelInfo
    after: ModelInfo
    tensors: tuple[Change, ...]
    """Tensors that came, went or differ; each side says type, shape, bytes and SHA-256 of the data."""
    metadata: tuple[Change, ...]
    """Keys of the GGUF file; of arrays, their length and the SHA-256 of their items."""
    settings: tuple[Change, ...]
    """Parameters, template, system text, licences and messages."""
    same_tensors: int
    """How many tensors are equal in type, shape and every byte."""

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not (self.tensors or self.metadata or self.settings)


def compare(before: ModelInfo, after: ModelInfo) -> Comparison:
    """Compare two models. Both files are read whole, unless they are one and the same blob."""
    settings = tuple(_changes(_settings(before), _settings(after)))
    if before.path is None or after.path is None or before.path == after.path:
        same = sum(total["tensors"] for total in after.types.values())
        return Comparison(before, after, (), (), settings, same if before.path == after.path else 0)
    with open_gguf(before.path) as old, open_gguf(after.path) as new:
        metadata = tuple(_changes(_metadata(old), _metadata(new)))
        one = {name: _tensor(tensor) for name, tensor in old.tensors.items()}
        other = {name: _tensor(tensor) for name, tensor in new.tensors.items()}
    tensors = tuple(_changes(one, other))
    changed = sum(change.after is not None for change in tensors)
    return Comparison(before, after, tensors, metadata, settings, len(other) - changed)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    names = [*before, *(name for name in after if name not in before)]
    return [
        Change(name, before.get(name), after.get(name))
        for name in names
        if not _equal(before.get(name), after.get(name))
    ]


def _equal(one: Any, other: Any) -> bool:
    """Also true of NaN and NaN."""
    return type(one) is type(other) and (one == other or repr(one) == repr(other))


def _tensor(tensor: GGUFTensor) -> dict[str, Any]:
    return {
        "type": tensor.type.name,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "sha256": hashlib.sha256(tensor.data.data).hexdigest(),
    }


def _metadata(file: GGUFFile) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if isinstance(value, GGUFArray):
            digest = hashlib.sha256()
            for item in value[:]:
                digest.update(f"{item!r}\n".encode())
            found[key] = {"items": len(value), "sha256": digest.hexdigest()}
        else:
            found[key] = value
    return found


def _settings(info: ModelInfo) -> dict[str, Any]:
    found: dict[str, Any] = {f"PARAMETER {name}": value for name, value in info.parameters.items()}
    found["TEMPLATE"] = info.template
    found["SYSTEM"] = info.system
    found |= {f"LICENSE {i + 1}": text for i, text in enumerate(info.licenses)}
    found |= {f"MESSAGE {i + 1}": f"{m.role}: {m.content}" for i, m in enumerate(info.messages)}
    return found
