"""What a conversion did, tensor by tensor: the value that :func:`azquant.convert` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from azquant.architectures.base import show_shape
from azquant.conversion.agreement import Agreement

__all__ = ["ConversionReport", "Coverage", "TensorRow"]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the file written."""

    name: str
    """GGUF name."""
    source: str
    """Name in the checkpoint; empty for a tensor computed from the config."""
    shape: tuple[int, ...]
    """(rows, columns)."""
    source_type: str
    """The checkpoint's dtype: ``"F32"``, ``"BF16"``, ...; empty for a computed tensor."""
    type: str
    """The ggml type written: ``"q4_0"``."""
    nbytes: int
    """Bytes in the file, without padding."""
    reason: str
    """Why ``type`` is not the one asked for; empty when it is."""

    @property
    def elements(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Coverage:
    """What became of each tensor of the checkpoint, by its name there."""

    once: tuple[str, ...]
    """Stored in the file, by themselves or as a part of a fused tensor."""
    twice: tuple[str, ...]
    """Stored more than once."""
    left_out: tuple[tuple[str, str], ...]
    """Not stored as a tensor, and why."""

    @property
    def total(self) -> int:
        """Tensors of the checkpoint."""
        return len(self.once) + len(self.twice) + len(self.left_out)


@dataclass(frozen=True)
class ConversionReport:
    """What was converted, into what, and what had to differ from what was asked."""

    source: Path
    destination: Path
    architecture: str
    """GGUF name of the architecture: ``"gpt2"``."""
    type: str
    """The type asked for."""
    tensors: tuple[TensorRow, ...]
    """In file order."""
    source_bytes: int
    """Size of the checkpoint's tensor files."""
    file_bytes: int | None
    """Size of the GGUF file; ``None`` after a dry run."""
    warnings: tuple[str, ...]
    """Every ConversionWarning that was given."""
    notes: tuple[str, ...]
    """Changes that lose nothing, such as a head stored once."""
    planned_bytes: int | None = None
    """What the file takes or would take, header and padding included; ``None`` where it is not known."""
    coverage: Coverage = Coverage((), (), ())
    """What became of each tensor of the checkpoint."""
    tokenizer: Agreement | None = None
    """How often llama.cpp's tokens differ; ``None`` where it has none, or ``tokenizers`` is not installed."""

    @property
    def parameters(self) -> int:
        """Weights in the file."""
        return sum(row.elements for row in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the file, without header and padding."""
        return sum(row.nbytes for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight over all tensors, scales included."""
        return 8 * self.tensor_bytes / self.parameters

    @property
    def fallbacks(self) -> tuple[TensorRow, ...]:
        """The tensors whose type differs from the one asked for."""
        return tuple(row for row in self.tensors if row.reason)

    def by_type(self) -> dict[str, tuple[int, int, int]]:
        """Per type written: (tensors, weights, bytes)."""
        totals: dict[str, tuple[int, int, int]] = {}
        for row in self.tensors:
            count, elements, nbytes = totals.get(row.type, (0, 0, 0))
            totals[row.type] = count + 1, elements + row.elements, nbytes + row.nbytes
        return totals

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """A table without its head: name, shape, type before, type after, bytes, reason."""
        return [
            (row.name, show_shape(row.shape), row.source_type, row.type, str(row.nbytes), row.reason)
            for row in self.tensors
        ]
