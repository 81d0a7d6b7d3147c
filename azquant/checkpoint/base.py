"""An open checkpoint: lazy tensors by name, the parsed config, and the files that hold them open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

from azquant.checkpoint.source import FileSource
from azquant.checkpoint.tensor import LazyTensor

__all__ = ["Checkpoint"]


class Checkpoint:
    """What :func:`open_checkpoint` gives: a context manager that keeps the weight files open.

    Tensors can be read, from any thread, until :meth:`close`.
    """

    def __init__(
        self,
        path: Path,
        format: Literal["safetensors", "torch"],
        tensors: Mapping[str, LazyTensor],
        config: dict[str, Any] | None,
        sources: tuple[FileSource, ...],
        read_extra: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.path = path
        """The folder or file that was opened."""
        self.format = format
        self.tensors: Mapping[str, LazyTensor] = MappingProxyType(dict(tensors))
        """Every tensor by name, in the order of the header, pickle or index."""
        self.config = config
        """config.json, parsed; None when there is none."""
        self.files: tuple[Path, ...] = tuple(source.path for source in sources)
        """The weight files."""
        self._sources = sources
        self._read_extra = read_extra
        self._extra: dict[str, Any] | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """What a torch file holds beside its state dict (model arguments, step counts, optimizer state, ...).

        Plain Python values with :class:`LazyTensor` leaves; empty for safetensors. Made when first asked for;
        raises CheckpointError when it is too deep, too large or holds itself.
        """
        if self._extra is None:
            self._extra = self._read_extra()
        return self._extra

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
        """The same open files under other names; closing either closes both."""
        return Checkpoint(self.path, self.format, tensors, self.config, self._sources, self._read_extra)

    def close(self) -> None:
        """Close the weight files; tensors cannot be read any more. Closing twice is allowed."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, {len(self.tensors)} tensors)"
