"""Weights as numbers, a band at a time: of a GGUF file, or of a checkpoint by the converter's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from azquant.architectures import architecture_of_config
from azquant.checkpoint import open_checkpoint
from azquant.conversion.plan import PlannedTensor, make_plan
from azquant.conversion.recipe import TARGETS
from azquant.errors import ConversionError
from azquant.gguf import GGUFTensor, open_gguf
from azquant.tensor import QTensor
from azquant.types import GGMLType

__all__ = ["Reference", "can_decode", "decode", "open_references"]

Floats = npt.NDArray[np.floating[Any]]

BAND = 1 << 20
"""Elements decoded together."""

_PLAIN = {"f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}


class Reference(Protocol):
    """What a tensor is compared with."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In NumPy's order."""

    @property
    def type_name(self) -> str:
        """What the values are stored as."""

    @property
    def decodable(self) -> bool:
        """Whether :meth:`bands` can give values."""

    @property
    def exact(self) -> bool:
        """Whether the values are the original weights, rather than quantized ones."""

    @property
    def bytes_of(self) -> npt.NDArray[np.uint8] | None:
        """The bytes, where they are in GGUF's form."""

    def bands(self) -> Iterator[Floats]:
        """All values in order, whole rows or whole blocks at a time."""


def can_decode(kind: GGMLType) -> bool:
    """Whether :func:`decode` can read ``kind``."""
    return kind.can_dequantize or kind.name in _PLAIN


def decode(data: npt.NDArray[np.uint8], kind: GGMLType) -> Floats:
    """The values of whole blocks: float32 (float64 for f64 and integers), (elements,).

    Raises UnsupportedTypeError for a type without a decoder.
    """
    if kind.name in _PLAIN:
        return data.view(_PLAIN[kind.name]).astype(np.float64)
    count = data.size // kind.block_bytes * kind.block_size
    return QTensor(data, (count,), kind).dequantize()


@dataclass(frozen=True)
class _FileTensor:
    tensor: GGUFTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def type_name(self) -> str:
        return self.tensor.type.name

    @property
    def decodable(self) -> bool:
        return can_decode(self.tensor.type)

    @property
    def exact(self) -> bool:
        return not self.tensor.type.is_quantized

    @property
    def bytes_of(self) -> npt.NDArray[np.uint8] | None:
        return self.tensor.data

    def bands(self) -> Iterator[Floats]:
        data, kind = self.tensor.data, self.tensor.type
        step = max(1, BAND // kind.block_size) * kind.block_bytes
        for at in range(0, data.size, step):
            yield decode(data[at : at + step], kind)


@dataclass(frozen=True)
class _CheckpointTensor:
    item: PlannedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.item.rule.shape

    @property
    def type_name(self) -> str:
        return self.item.source.dtype.lower() if self.item.source else "computed"

    @property
    def decodable(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return True

    @property
    def bytes_of(self) -> npt.NDArray[np.uint8] | None:
        return None

    def bands(self) -> Iterator[Floats]:
        rule = self.item.rule
        rows = max(1, BAND // max(1, rule.row_elements))
        source: Any = self.item.source  # a Constant asks nothing of its source
        yield from rule.transform.bands(source, rows)


def open_references(source: Path, stack: ExitStack) -> Mapping[str, Reference]:
    """The tensors of ``source`` by their GGUF names; ``stack`` keeps it open.

    A file that begins as GGUF is one; anything else is a checkpoint (a folder, or its weights' file), read by
    the rules of :func:`azquant.convert`. Raises what opening and planning raise.
    """
    if source.is_file() and _begins_as_gguf(source):
        file = stack.enter_context(open_gguf(source))
        return {name: _FileTensor(tensor) for name, tensor in file.tensors.items()}
    checkpoint = stack.enter_context(open_checkpoint(source))
    if checkpoint.config is None:
        raise ConversionError(
            f"{source}: there is no config.json beside the weights, which says how to compare them"
        )
    architecture = architecture_of_config(checkpoint.config)
    config = architecture.config.from_hf(checkpoint.config)
    plan = make_plan(architecture, config, checkpoint, TARGETS["f32"])
    return {item.rule.name: _CheckpointTensor(item) for item in plan.tensors}


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    except OSError:
        return False  # what opens it next says why
