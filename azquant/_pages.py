"""Telling the system that pages of a mapped file are not needed for now."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from azquant._lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["drop_pages", "drop_range"]


def _mapped(array: npt.NDArray[np.uint8]) -> mmap.mmap | None:
    """The read-only map of a file that the array is a view of."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    found = owner.obj if isinstance(owner, memoryview) else owner
    if not isinstance(found, mmap.mmap):
        return None
    with memoryview(found) as view:  # what is written into a private map would be lost with its pages
        return found if view.readonly else None


def drop_pages(array: npt.NDArray[np.uint8]) -> None:
    """Gives back the memory of the whole pages under a contiguous view of a file mapped for reading.

    They count no longer as this process's memory; reading them again is allowed, only slower. Nothing happens
    to an array that is no such view, or where the system cannot do it.
    """
    found = _mapped(array) if array.nbytes and hasattr(mmap, "MADV_DONTNEED") else None
    if found is not None:
        start = array.ctypes.data - np.frombuffer(found, np.uint8).ctypes.data
        drop_range(found, start, start + array.nbytes)


def drop_range(mapped: object, start: int, stop: int) -> None:
    """The same of bytes ``start`` to ``stop`` of a file mapped for reading; anything else is left alone."""
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)
