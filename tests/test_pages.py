"""What pack() does with the pages of a mapped file."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import azquant as aq
from azquant._pages import drop_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def resident(path: Path) -> int:
    """Kilobytes of the file that this process has in memory through its maps."""
    kilobytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    return kilobytes


def mapped(path: Path, access: int = mmap.ACCESS_READ) -> np.ndarray:
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=access), np.uint8)


def a_file_of_weights(path: Path) -> aq.QTensor:
    q = aq.quantize(np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32), "q4_0")
    path.write_bytes(bytes(64) + q.data.tobytes())
    return q


def test_packing_gives_back_the_pages_of_the_file(tmp_path: Path, needs_c: None) -> None:
    path = tmp_path / "weights"
    original = a_file_of_weights(path)
    data = mapped(path)[64:]
    w = aq.QTensor(data, original.shape, "q4_0")
    assert np.array_equal(w.data, original.data)  # reads every page
    assert resident(path) * 1024 >= original.nbytes
    w.pack()
    assert resident(path) <= 8  # the pages that the tensor shares with others
    assert np.array_equal(w.data, original.data)  # still there to be read
    x = np.ones((3, 1024), np.float32)
    assert np.array_equal(aq.matmul(x, w), aq.matmul(x, original))
    assert np.array_equal(w.unpack(), original.data)


def test_types_without_a_packed_form_keep_their_pages(tmp_path: Path, needs_c: None) -> None:
    path = tmp_path / "weights"
    path.write_bytes(np.ones((256, 256), np.float32).tobytes())
    w = aq.QTensor(mapped(path), (256, 256), "f32")
    before = w.dequantize()
    held = resident(path)
    assert held >= 256
    w.pack()
    assert resident(path) == held
    assert np.array_equal(w.dequantize(), before)


def test_other_memory_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 64)
    private = mapped(path, mmap.ACCESS_COPY)
    private[:] = 7  # kept nowhere but in these pages
    drop_pages(private)
    assert (private == 7).all()
    array = np.full(1 << 16, 9, np.uint8)
    drop_pages(array[5:])
    assert (array == 9).all()
    drop_pages(array[:0])


def test_only_whole_pages_within_the_view_go(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(16 * mmap.PAGESIZE))
    data = mapped(path)
    assert not data.any()
    page = mmap.PAGESIZE // 1024
    assert resident(path) == 16 * page
    drop_pages(data[mmap.PAGESIZE + 1 : 4 * mmap.PAGESIZE - 1])
    assert resident(path) == 15 * page
    drop_pages(data[5 * mmap.PAGESIZE : 5 * mmap.PAGESIZE + 100])
    assert resident(path) == 15 * page
