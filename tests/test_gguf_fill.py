"""Tensor data made by several threads: the same file, errors in the file's order, nothing half written."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from azquant.errors import InternalError, OutputError
from azquant.gguf import Piece, TensorSpec, fill, open_gguf, write_gguf
from azquant.types import get_type

BYTES = np.random.default_rng(0).integers(0, 256, (3, 1_000_003), np.uint8)
SPECS = [TensorSpec(f"t{i}", (BYTES.shape[1],), get_type("i8")) for i in range(len(BYTES))]
CUT = 65_537


def whole(spec: TensorSpec) -> list[Any]:
    return [BYTES[SPECS.index(spec)]]


def pieces(
    make: Callable[[int, int, int], Any] = lambda i, start, stop: (BYTES[i, start:stop],), memory: int = 0
) -> Callable[[TensorSpec], Iterator[Piece]]:
    """Each tensor in pieces of CUT bytes; ``make`` is told the tensor's number and the range."""

    def data(spec: TensorSpec) -> Iterator[Piece]:
        i = SPECS.index(spec)
        for start in range(0, spec.nbytes, CUT):
            stop = min(start + CUT, spec.nbytes)
            yield Piece(stop - start, lambda start=start, stop=stop: make(i, start, stop), memory)  # type: ignore[misc]

    return data


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("settle", [1, 1 << 20, 1 << 40])
def test_pieces_make_the_file_that_buffers_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, settle: int
) -> None:
    monkeypatch.setattr(fill, "_SETTLE", settle)
    write_gguf(tmp_path / "a.gguf", {}, SPECS, whole)
    told: list[int] = []
    write_gguf(
        tmp_path / "b.gguf", {}, SPECS, pieces(), threads=threads, progress=lambda done, _: told.append(done)
    )
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert told == sorted(told)
    assert told[-1] == (tmp_path / "b.gguf").stat().st_size


def test_pieces_and_buffers_may_alternate(tmp_path: Path) -> None:
    def data(spec: TensorSpec) -> Iterator[Any]:
        for n, piece in enumerate(pieces()(spec)):
            yield from [piece] if n % 3 else piece.make()

    write_gguf(tmp_path / "a.gguf", {}, SPECS, data, threads=3)
    with open_gguf(tmp_path / "a.gguf") as file:
        assert all((file.tensors[f"t{i}"].data == row).all() for i, row in enumerate(BYTES))


def test_the_error_raised_is_that_of_the_first_piece_in_the_file(tmp_path: Path) -> None:
    def make(i: int, start: int, stop: int) -> list[Any]:
        if (i, start) == (1, 2 * CUT):
            time.sleep(0.05)  # the next fails before
            raise ValueError("first")
        if (i, start) > (1, 2 * CUT):
            raise ValueError("later")
        return [BYTES[i, start:stop]]

    with pytest.raises(ValueError, match="first"):
        write_gguf(tmp_path / "a.gguf", {}, SPECS, pieces(make), threads=4)
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("azquant")]


@pytest.mark.parametrize("off", [-1, 1])
def test_a_piece_of_another_size_is_refused(tmp_path: Path, off: int) -> None:
    with pytest.raises(InternalError, match=r"piece of \d+ bytes"):
        write_gguf(tmp_path / "a.gguf", {}, SPECS, pieces(lambda i, a, b: [bytes(b - a + off)]))
    assert not list(tmp_path.iterdir())


def test_pieces_being_made_share_a_bound_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "_HELD", 100)
    lock, now, most = threading.Lock(), [0], [0]

    def make(i: int, start: int, stop: int) -> Iterator[Any]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        yield BYTES[i, start:stop]
        with lock:
            now[0] -= 1

    write_gguf(tmp_path / "a.gguf", {}, SPECS, pieces(make, memory=40), threads=8)
    assert most[0] <= 2


@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_a_bit_that_changes_on_the_disk_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: float
) -> None:
    """Each time it is synced a bit of what is there by then is another; once is enough to be found."""
    monkeypatch.setattr(fill, "_SETTLE", 1 << 19)
    real, changed = os.fsync, []

    def corrupting(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if not changed and size > where * BYTES.size:
            changed.append(int(where * BYTES.size) + 200)
            byte = os.pread(descriptor, 1, changed[0])
            os.pwrite(descriptor, bytes([byte[0] ^ 4]), changed[0])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", corrupting)
    with pytest.raises(OutputError, match=r"tensor 't[012]' reads back otherwise"):
        write_gguf(tmp_path / "a.gguf", {}, SPECS, pieces(), threads=2)
    assert changed
    assert not list(tmp_path.iterdir())
