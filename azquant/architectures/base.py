"""What an architecture is made of: a checked config, and one rule per tensor that says where it comes from.

A rule serves both directions. The converter follows it from the checkpoint to the GGUF tensor; the loader
reads from it which tensors a file must hold and in which shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

from azquant._lazy import np
from azquant.errors import ModelError
from azquant.gguf import MetadataValue
from azquant.program import ProgramSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self  # typing has it from Python 3.11 on

    from azquant.program import Floats

    Float32: TypeAlias = NDArray[np.float32]

__all__ = [
    "Architecture",
    "Constant",
    "HasShape",
    "Keep",
    "ModelConfig",
    "RopeInterleave",
    "ScaleRows",
    "Shift",
    "Stack",
    "TensorRule",
    "TensorSource",
    "Transform",
    "Transpose",
    "UngroupQKV",
    "Weights",
    "show_shape",
]

_TURNED_ROWS = 128  # of a matrix to be transposed, at a time


class TensorSource(Protocol):
    """What a transform needs of a checkpoint's tensor: its shape, and its rows as float32."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read_f32(self, start: int = 0, stop: int | None = None) -> Float32: ...


class Transform(Protocol):
    """How a checkpoint's tensor becomes the GGUF tensor, in bands of rows so that memory stays small."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape the source must have for the GGUF tensor to have ``shape``."""

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        """The GGUF tensor from its first row to its last, about ``rows`` rows at a time."""


@dataclass(frozen=True)
class Keep:
    """The tensor as it is."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        for start in range(0, source.shape[0], rows):
            yield source.read_f32(start, min(start + rows, source.shape[0]))


@dataclass(frozen=True)
class Stack(Keep):
    """Matrices of one shape, read one below the other, as a tensor of three dimensions."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * shape[1], shape[2])


@dataclass(frozen=True)
class Transpose:
    """A (in, out) matrix, as GPT-2's Conv1D stores it, turned to (out, in). Held whole, turned."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        height, width = source.shape
        turned = np.empty((width, height), dtype=np.float32)
        # Rows a little apart: columns of a power of two would all fall on the same few lines of the cache.
        some = np.empty((_TURNED_ROWS, width + 16), dtype=np.float32)[:, :width]
        for row in range(0, height, _TURNED_ROWS):
            last = min(row + _TURNED_ROWS, height)
            band = some[: last - row]
            band[:] = source.read_f32(row, last)
            turned[:, row:last] = band.T
        for start in range(0, width, rows):
            yield turned[start : start + rows]


@dataclass(frozen=True)
class RopeInterleave:
    """Rows of every head reordered for RoPE over neighbouring pairs, which llama.cpp's llama graph computes.

    Hugging Face rotates row ``i`` of a head together with row ``i + head_dim/2``; GGUF stores the two side by
    side. ``heads`` is the number of heads in this tensor (key heads for K). Weights and biases alike.
    """

    heads: int

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        head_dim = source.shape[0] // self.heads
        step = max(1, rows // head_dim) * head_dim
        for start in range(0, source.shape[0], step):
            band = source.read_f32(start, min(start + step, source.shape[0]))
            halves = band.reshape(-1, 2, head_dim // 2, *band.shape[1:])
            yield np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(band.shape)


@dataclass(frozen=True)
class ScaleRows:
    """After ``inner``, the first ``rows`` rows multiplied by ``factor`` in float32."""

    inner: Transform
    rows: int
    factor: float

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.inner.source_shape(shape)

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        first = 0
        for band in self.inner.bands(source, rows):
            scaled = band.copy()
            scaled[: max(0, self.rows - first)] *= np.float32(self.factor)
            first += band.shape[0]
            yield scaled


@dataclass(frozen=True)
class Shift:
    """Every element plus ``amount``, in float32: norms that multiply by 1 + weight."""

    amount: float

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        for band in Keep().bands(source, rows):
            yield band + np.float32(self.amount)


@dataclass(frozen=True)
class UngroupQKV:
    """A fused projection of ``groups`` x (queries, one key, one value) turned to all queries, keys, values.

    Each group has ``queries`` heads of ``head_dim`` rows before its key head. Weights and biases alike.
    """

    groups: int
    queries: int
    head_dim: int

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        each = self.queries + 2
        heads = [group * each + i for group in range(self.groups) for i in range(self.queries)]
        heads += [group * each + each - 2 for group in range(self.groups)]
        heads += [group * each + each - 1 for group in range(self.groups)]
        at_once = max(1, rows // self.head_dim)
        for first in range(0, len(heads), at_once):
            starts = [head * self.head_dim for head in heads[first : first + at_once]]
            yield np.concatenate([source.read_f32(start, start + self.head_dim) for start in starts])


@dataclass(frozen=True)
class Constant:
    """A vector that no checkpoint holds: ``values``, computed from the config; empty if there is none."""

    values: tuple[float, ...]

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def bands(self, source: TensorSource, rows: int) -> Iterator[Float32]:
        yield np.asarray(self.values, dtype=np.float32)


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a model: its GGUF name and shape, and how the converter makes it."""

    name: str
    """GGUF name: ``"blk.0.attn_qkv.weight"``."""
    shape: tuple[int, ...]
    """GGUF shape in NumPy order: (rows, columns)."""
    source: str
    """Name in the checkpoint without the architecture's prefix; empty for a :class:`Constant`."""
    transform: Transform = Keep()
    optional: bool = False
    """Whether a model may do without it."""
    parts: tuple[str, ...] = ()
    """Names of the matrices that are stacked; ``source`` is then what they are called together."""

    @property
    def row_elements(self) -> int:
        """Elements of the rows that bands are made of."""
        return self.shape[-1] if self.parts else prod(self.shape[1:])


class ModelConfig(Protocol):
    """What every architecture's config dataclass offers."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def tied(self) -> bool | None:
        """Whether the embedding is also the output head; ``None`` when only the tensors tell."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""

    def metadata(self) -> dict[str, MetadataValue]:
        """The ``<arch>.*`` keys of the GGUF file."""


class Weights(Protocol):
    """A model's weights by GGUF name, as programs take them."""

    def matrix(self, name: str) -> Any:
        """A two-dimensional tensor, as the backend's matrix. Raises ModelError when it is missing."""

    def experts(self, name: str) -> tuple[Any, ...]:
        """A three-dimensional tensor, as a matrix for each expert. Raises ModelError when it is missing."""

    def vector(self, name: str) -> Floats:
        """A one-dimensional tensor as float32. Raises ModelError when it is missing."""

    def optional_vector(self, name: str) -> Floats | None:
        """The same, or ``None`` when it is missing."""

    def head(self) -> Any:
        """The output head's matrix: the token embedding's own where there is no other."""


class HasShape(Protocol):
    """A tensor whose shape can be asked, such as :class:`azquant.gguf.GGUFTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


@dataclass(frozen=True)
class Architecture(Generic[ConfigT]):
    """One model family: how its checkpoints convert and what its GGUF files hold."""

    name: str
    """As ``general.architecture`` has it."""
    hf_names: tuple[str, ...]
    """Class names that ``config.json`` may list under ``architectures``."""
    config: type[ConfigT]
    rules: Callable[[ConfigT], list[TensorRule]]
    """Every tensor of a model with this config, in file order."""
    prefixes: tuple[str, ...]
    """What may stand before every tensor name but the head's, most common first; ``""`` for nothing."""
    program: Callable[[ConfigT, Weights], ProgramSpec[Any]]
    """The op list that runs a model with this config on these weights."""
    hf_sizes: tuple[str, ...]
    """Keys of ``config.json`` that decide shapes, for messages."""
    model_types: tuple[str, ...] = ()
    """What ``model_type`` of ``config.json`` may be besides ``name``."""
    harmless: tuple[re.Pattern[str], ...] = ()
    """Names (without prefix) of buffers that carry no weights and are left out."""
    head: Literal["optional", "required", "tied"] = "optional"
    """Whether llama.cpp takes the embedding for a head that is not there, asks for one, or knows none."""

    EMBEDDING: ClassVar[str] = "token_embd.weight"
    HEAD: ClassVar[str] = "output.weight"

    def is_harmless(self, name: str) -> bool:
        """Whether ``name`` (without prefix) is a buffer that may be left out."""
        return any(pattern.fullmatch(name) for pattern in self.harmless)

    def check_tensors(self, config: ConfigT, tensors: Mapping[str, HasShape]) -> None:
        """Check a GGUF file's tensors against ``config``: all that are needed, in their shapes, no others.

        A tensor that nothing here uses would change what the model computes. Raises ModelError naming the
        tensor, the shape found and the one the metadata asks for.
        """
        rules = self.rules(config)
        unknown = set(tensors).difference(rule.name for rule in rules)
        if unknown:
            raise ModelError(
                f"tensor {min(unknown):.80} is none that a {self.name} model with this metadata has"
            )
        for rule in rules:
            tensor = tensors.get(rule.name)
            if tensor is None:
                if not rule.optional:
                    raise ModelError(f"tensor {rule.name} is missing; a {self.name} model needs it")
            elif tuple(tensor.shape) != rule.shape:
                raise ModelError(
                    f"tensor {rule.name} has shape {show_shape(tensor.shape)}, "
                    f"but the metadata asks for {show_shape(rule.shape)}"
                )


def show_shape(shape: Sequence[int]) -> str:
    """A shape as messages and tables show it: ``"768 x 2304"``."""
    return " x ".join(map(str, shape)) if shape else "scalar"
