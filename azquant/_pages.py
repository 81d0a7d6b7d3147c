"""Telling the system that pages of a mapped file are not needed for now."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

__all__ = ["drop_pages"]


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
    if found is None:
        return
    start = array.ctypes.data - np.frombuffer(found, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        found.madvise(mmap.MADV_DONTNEED, first, last - first)
